"""What the harness itself runs in a guest."""

from __future__ import annotations

import subprocess

from pyluo import kho

__all__ = ["dmesg", "run"]


def run(argv: list[str], folder: str, timeout: float) -> tuple[int, bytes, bytes]:
    """Runs a program; its exit status, stdout and stderr."""
    done = subprocess.run(
        argv, cwd=folder, timeout=timeout, stdin=subprocess.DEVNULL, capture_output=True
    )
    return done.returncode, done.stdout, done.stderr


def dmesg() -> str:
    """The messages of this kernel, one a line."""
    return "\n".join(kho.messages())
