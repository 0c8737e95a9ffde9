"""What the harness itself runs in a guest."""

from __future__ import annotations

import os
from typing import BinaryIO

from pyluo.kernel_log import KernelLog

__all__ = ["dmesg", "run"]


def run(argv: list[str], folder: str, timeout: float) -> tuple[int, bytes, bytes]:
    """Runs a program; its exit status, stdout and stderr.

    What it leaves running in the background is not waited for.
    """
    import subprocess  # here, since no guest should wait for it that runs no programs

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


def note(words: str) -> None:
    """Writes a line to the kernel's log, at the level of its warnings."""
    with open("/dev/kmsg", "w") as log:
        log.write(f"<4>{words}\n")


def dmesg() -> str:
    """The messages of this kernel, one a line."""
    return "\n".join(KernelLog().messages)
