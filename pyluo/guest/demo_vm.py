"""The functions that `pyluo demo --vm` runs in a guest, which is the host of a VM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from pyluo.guest.port import mark

__all__ = ["last_line", "resume", "start", "store"]

_NAME = "demo"
_CONSOLE = "/tmp/demo.console"
_MESSAGES = "/tmp/demo.messages"
_PATIENCE = 240.0  # seconds; a VM in an emulated guest on a busy machine needs many
_POLL = 0.02  # seconds

_vmm: subprocess.Popen[bytes]


def start(program: str, options: list[str]) -> None:
    """Start a VMM with a VM; return when the VM has said its first lines.

    Args:
        program: the path of examples/qemu_live_update/qemu_live_update.py.
        options: QEMU's options.
    """
    _start(program, "run", _NAME, "--memory", "80", "--", *options)
    _wait_for_lines(3)


def store() -> None:
    """Have the VMM pause the VM, and store it."""
    _vmm.send_signal(signal.SIGUSR1)
    while "is stored" not in _read(_MESSAGES):
        _check()


def resume(program: str) -> None:
    """Have a new VMM go on with the VM; return when the VM has said its next lines."""
    _start(program, "resume", _NAME)
    while "runs again" not in _read(_MESSAGES):
        _check()
    mark("VM resumed")
    _wait_for_lines(1)
    mark("first line of the VM")
    _wait_for_lines(3)


def last_line(number: int = -1) -> str:
    """Return a whole line that the VM has said in this life of its VMM; by default its last."""
    return _lines()[number]


def _start(program: str, *words: str) -> None:
    global _vmm

    path = os.pathsep.join(sys.path)
    with open(_CONSOLE, "wb") as console, open(_MESSAGES, "wb") as messages:
        _vmm = subprocess.Popen(
            [sys.executable, program, *words],
            stdout=console,
            stderr=messages,
            env=os.environ | {"PYTHONPATH": path},
        )


def _read(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()


def _lines() -> list[str]:
    # What QEMU was saved in the midst of is said in two parts, by two QEMUs: the first is no line.
    whole = _read(_CONSOLE).splitlines()
    return [line for line in whole if line.startswith("vm boot=") and " backwards=" in line]


def _wait_for_lines(count: int) -> None:
    until = time.monotonic() + _PATIENCE
    while len(_lines()) < count:
        _check()
        if time.monotonic() > until:
            raise TimeoutError(f"the VM said {_read(_CONSOLE)[-300:]!r}")


def _check() -> None:
    """Wait a little; raise if the VMM has ended."""
    time.sleep(_POLL)
    if (status := _vmm.poll()) is not None:
        raise RuntimeError(f"the VMM ended with status {status}: {_read(_MESSAGES)}")
