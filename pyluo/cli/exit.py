"""The exit statuses."""

from __future__ import annotations

__all__ = ["FAILED", "INTERRUPTED", "PASSED", "UNAVAILABLE", "USAGE"]

PASSED = 0
FAILED = 1
USAGE = 2  # argparse's own
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h
INTERRUPTED = 130  # as a shell reports SIGINT
