"""A process between the harness and one QEMU: it ends QEMU, and cleans up, when the harness ends.

It is run as a script, without site: `keeper.py FOLDER ALIVE STATUS COMMAND...`.

* The keeper creates FOLDER itself, so that at no moment there is a folder that nobody would remove.
* ALIVE is a pipe from the harness. When a byte comes through it, or the harness has ended in any
  way and so closed it, the keeper kills QEMU and removes the folder.
* STATUS is a pipe to the harness. The keeper writes a line with QEMU's process id, then a line with
  its exit status; or a line that says what is wrong with the folder.

The harness does not run QEMU with a parent-death signal instead, because that would kill QEMU when
the thread that started it ends; a pipe belongs to the whole process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
from contextlib import suppress

MESSAGES = "qemu.log"  # the file in the folder with QEMU's own messages


def main(folder: str, alive: int, status: int, command: list[str]) -> None:
    """Run COMMAND until it ends, or until the harness ends."""
    try:
        os.mkdir(folder, 0o700)
    except OSError as error:
        _report(status, error)
        return
    try:
        _redirect_output(os.path.join(folder, MESSAGES))
    except OSError as error:
        _report(status, error)
        shutil.rmtree(folder, ignore_errors=True)
        return
    qemu = os.fork()
    if not qemu:
        os.close(alive)
        os.close(status)
        _exec(["setpriv", "--pdeathsig", "KILL", "--", *command])
    # The channels must close when QEMU ends, so that no other process may hold them open.
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


def _redirect_output(path: str) -> None:
    """Redirect stdout and stderr to a file."""
    messages = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd in (1, 2):
        os.dup2(messages, fd)
    os.close(messages)


def _close_all_but(*kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if (fd := int(name)) > 2 and fd not in kept:
            with suppress(OSError):  # the descriptor of the listing itself is closed already
                os.close(fd)


def _exec(command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _report(status: int, what: object) -> None:
    # If the harness is gone, nobody reads this, and cleaning up is all that is left to do.
    with suppress(BrokenPipeError):
        os.write(status, f"{what}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
