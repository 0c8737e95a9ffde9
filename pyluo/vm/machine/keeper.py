"""The keeper: a process that runs one QEMU, and kills it and cleans up when the harness ends.

The keeper is run as a script, with -S: `keeper.py FOLDER ALIVE STATUS TEXTS COMMAND...`.

* FOLDER is the folder for QEMU's files. The keeper creates and removes it, so that there is never a
  folder that no process would remove.
* ALIVE is the descriptor of a pipe from the harness. When the harness writes a byte, or ends in any
  way, which closes the pipe, the keeper kills QEMU and removes the folder.
* STATUS is the descriptor of a pipe to the harness. The keeper writes a line with QEMU's process
  id, and later a line with QEMU's exit status. If the folder cannot be created, it writes a line
  with the error instead.
* TEXTS is the descriptor of a file with the texts of files, by their paths, in JSON: the keeper
  writes these files below `files` in the folder. It is -1 if there are none.
* COMMAND is QEMU's command line.

The harness does not start QEMU itself with a parent-death signal, because that would kill QEMU when
the thread that started it ends. A pipe belongs to the whole process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
from contextlib import suppress

MESSAGES = "qemu.log"  # the name of the file in the folder that contains QEMU's own messages
FILES = "files"  # the name of the folder in the folder that contains the files for the guest


def main(folder: str, alive: int, status: int, texts: int, command: list[str]) -> None:
    """Run the command until it ends or the harness ends, and clean up when the harness ends."""
    try:
        os.mkdir(folder, 0o700)
    except OSError as error:
        _report(status, error)
        return
    try:
        if texts >= 0:
            _write_files(os.path.join(folder, FILES), texts)
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
    # The harness must see its channels close when QEMU ends, so this process must not have QEMU's
    # ends of them open.
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


def _write_files(folder: str, texts: int) -> None:
    """Write the files whose texts are in a file in JSON, and close that file."""
    import json  # here, because most guests need none of this

    with open(texts) as file:
        for name, text in json.load(file).items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as written:
                written.write(text)


def _redirect_output(path: str) -> None:
    """Redirect stdout and stderr to a file."""
    messages = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd in (1, 2):
        os.dup2(messages, fd)
    os.close(messages)


def _close_all_but(*kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if (fd := int(name)) > 2 and fd not in kept:
            with suppress(OSError):  # the descriptor with which listdir read is closed already
                os.close(fd)


def _exec(command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _report(status: int, what: object) -> None:
    # If the harness has ended, nobody reads this; go on, because the folder must be removed.
    with suppress(BrokenPipeError):
        os.write(status, f"{what}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
