"""The kernels for guests: choose, fetch, configure, build and cache them, and look up symbols."""
