"""Functions that the harness itself runs in a guest."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from pyluo.kernel_log import KernelLog

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = [
    "PATH",
    "dmesg",
    "find_program",
    "jump_by_systemctl",
    "log_warning",
    "run",
    "show_warnings",
]

_SYSTEMCTL_TIMEOUT = 60.0  # seconds

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The PATH of programs in a guest."""


def find_program(name: str, folder: str) -> str | None:
    """Return the path of a program, as the guest would find it; None if it could not run it.

    Args:
        name: the path of the program, or its name in the guest's PATH.
        folder: the folder that a relative path begins at.
    """
    folders = [""] if "/" in name else os.get_exec_path()
    for each in folders:
        path = os.path.join(folder, each, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


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


def show_warnings() -> None:
    """Let the kernel's warnings appear on the console, where the host needs them.

    The guest may have booted with `quiet`. A kernel without CONFIG_SYSCTL has no such setting.
    """
    with suppress(FileNotFoundError), open("/proc/sys/kernel/printk", "r+b", buffering=0) as levels:
        if int(levels.read().split()[0]) < 6:
            levels.seek(0)
            levels.write(b"6")


def jump_by_systemctl() -> NoReturn:
    """Have systemd stop the services and jump to the loaded kernel; this does not return.

    Raises:
        RuntimeError: systemd refused.
    """
    import signal  # here, as in `run`

    # It returns when systemd has begun; this process may live until the jump.
    status, _, complaint = run(["systemctl", "kexec"], "/", _SYSTEMCTL_TIMEOUT)
    if status:
        raise RuntimeError(f"systemctl kexec failed ({complaint.decode(errors='replace').strip()})")
    while True:
        signal.pause()


def dmesg() -> str:
    """Return the messages in the log of the running kernel, one per line."""
    return "\n".join(KernelLog().messages)
