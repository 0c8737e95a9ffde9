"""Small functions that the harness itself runs in a guest."""

from __future__ import annotations

import os
from typing import BinaryIO

from pyluo.kernel_log import KernelLog

__all__ = ["dmesg", "log_warning", "run"]


def run(argv: list[str], folder: str, timeout: float) -> tuple[int, bytes, bytes]:
    """Run a program and return its exit status, stdout and stderr.

    Processes that it leaves in the background are not waited for.
    """
    import subprocess  # here, because it takes a moment to load, and few guests run programs

    with (
        open(os.memfd_create("stdout"), "w+b") as out,
        open(os.memfd_create("stderr"), "w+b") as err,
    ):
        done = subprocess.run(
            argv, cwd=folder, timeout=timeout, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        return done.returncode, _content(out), _content(err)


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def log_warning(text: str) -> None:
    """Write a line to the kernel's log, at the level of warnings."""
    with open("/dev/kmsg", "w") as log:
        log.write(f"<4>{text}\n")


def dmesg() -> str:
    """Return the messages of this kernel, one per line."""
    return "\n".join(KernelLog().messages)
