"""Tests that every live update should pass; `pyluo vm matrix` and `bisect` run them by default."""
