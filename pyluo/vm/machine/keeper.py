"""Stands between the harness and one QEMU, so that neither outlives the other for long.

Run as a script, without site: `keeper.py FOLDER ALIVE STATUS COMMAND...`. The keeper makes FOLDER
itself, so that at no moment there is one that nobody would remove. ALIVE is a pipe whose other end
the harness holds: when a byte comes through it, or that end is gone, however the harness ended,
QEMU is killed and the folder removed. STATUS is a pipe to it: a line with QEMU's process id, then
one with its exit status; or what is wrong with the folder. A thread's death would set off a
parent-death signal in QEMU; a pipe belongs to a process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
from contextlib import suppress

MESSAGES = "qemu.log"  # in the folder: what QEMU has to say


def main(folder: str, alive: int, status: int, command: list[str]) -> None:
    """Runs COMMAND until it ends or the harness does."""
    try:
        os.mkdir(folder, 0o700)
    except OSError as error:
        _report(status, error)
        return
    try:
        _write_to(os.path.join(folder, MESSAGES))
    except OSError as error:
        _report(status, error)
        shutil.rmtree(folder, ignore_errors=True)
        return
    qemu = os.fork()
    if not qemu:
        os.close(alive)
        os.close(status)
        _become(["setpriv", "--pdeathsig", "KILL", "--", *command])
    # A channel is at its end when QEMU is: nobody else may hold it open.
    _close_all_but(alive, status)
    _report(status, qemu)
    handle = os.pidfd_open(qemu)
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(handle, select.POLLIN)
    if not any(fd == handle for fd, _ in poll.poll()):
        os.kill(qemu, signal.SIGKILL)
    _, ended = os.waitpid(qemu, 0)
    _report(status, os.waitstatus_to_exitcode(ended))
    os.close(status)
    os.read(alive, 1)
    shutil.rmtree(folder, ignore_errors=True)


def _write_to(path: str) -> None:
    """Has stdout and stderr go to a file."""
    messages = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd in (1, 2):
        os.dup2(messages, fd)
    os.close(messages)


def _close_all_but(*kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if (fd := int(name)) > 2 and fd not in kept:
            with suppress(OSError):  # the one that listed the others
                os.close(fd)


def _become(command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _report(status: int, what: object) -> None:
    # Without a harness to read it, what is left to do is to clean up.
    with suppress(BrokenPipeError):
        os.write(status, f"{what}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
