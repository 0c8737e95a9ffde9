"""Kernels: choose, fetch, configure, build and cache them, and find their symbols."""
