"""Functions that the harness itself runs in a guest."""

from __future__ import annotations

import os
from typing import BinaryIO

from pyluo.kernel_log import KernelLog

__all__ = ["dmesg", "log_warning", "run"]


def run(argv: list[str], folder: str, timeout: float) -> tuple[int, bytes, bytes]:
    """Run a program, and return its exit status, its stdout and its stderr.

    This does not wait for processes that the program leaves in the background.

    Args:
        argv: the program and its arguments.
        folder: the folder to run the program in.
        timeout: seconds after which the program is killed.

    Raises:
        subprocess.TimeoutExpired: the program was killed; the error has its output so far.
    """
    import subprocess  # here, because it takes a moment to load, and few guests run programs

    with (
        open(os.memfd_create("stdout"), "w+b") as out,
        open(os.memfd_create("stderr"), "w+b") as err,
    ):
        try:
            done = subprocess.run(
                argv, cwd=folder, timeout=timeout, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        except subprocess.TimeoutExpired as error:
            error.output, error.stderr = _read_all(out), _read_all(err)
            raise
        return done.returncode, _read_all(out), _read_all(err)


def _read_all(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def log_warning(text: str) -> None:
    """Write a line to the kernel's log, at the log level of warnings."""
    with open("/dev/kmsg", "w") as log:
        log.write(f"<4>{text}\n")


def dmesg() -> str:
    """Return the messages in the log of the running kernel, one per line."""
    return "\n".join(KernelLog().messages)
