"""The pytest plugin: its options, fixtures, markers and recorder."""
