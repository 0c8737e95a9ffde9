"""The exit statuses of the `pyluo` command."""

from __future__ import annotations

__all__ = ["FAILED", "INTERRUPTED", "PASSED", "UNAVAILABLE", "UNTESTABLE", "USAGE"]

PASSED = 0
FAILED = 1
USAGE = 2  # the status with which argparse exits
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h
UNTESTABLE = 125  # git-bisect(1): the commit cannot be tested
INTERRUPTED = 130  # 128 + SIGINT, which a shell reports for an interrupted command
