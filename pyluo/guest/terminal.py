"""A program in the guest whose terminal, or whose pipes, are the host's.

A process of its own carries the bytes, so that neither the worker nor the program waits for the
other. It speaks the frames of `wire` over a port of its own:

| to the guest | |
| --- | --- |
| `input` | bytes for the program |
| `eof` | no more of them will come |
| `size` | rows and columns of the host's terminal |

| to the host | |
| --- | --- |
| `output`, `error` | bytes from the program |
| `taken` | how many more bytes of a pipe the program has read |
| `folder` | where the program is now |
| `end` | the program's exit status, or the negative number of a signal that ended it |
| `failed` | the exception that ended the carrier |
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.guest import port, wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

    Size = tuple[int, int]

__all__ = ["start", "wait"]

_HOSTNAME = "guest"
# Shells without a start file of their own would not tell the guest from the host; that of Debian's
# bash shows the name of the machine.
_PROMPT = "guest:$PWD# "
_SHELL = "/bin/sh"
_CHUNK = 1 << 14  # bytes of output in a frame
_PIECE = 1 << 12  # bytes for the program at a time: a page, which is a slot of a pipe
_ROOM = 1 << 16  # bytes for the program that may wait here
_SHORTLY = 100  # milliseconds
_NOT_RUNNABLE, _NOT_FOUND = 126, 127  # as shells have it
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


def start(
    boot_id: str,
    argv: Sequence[str],
    folders: Sequence[str],
    environment: Mapping[str, str],
    size: Size | None,
) -> int:
    """Starts a program, and a process that carries what it reads and writes.

    Args:
        boot_id: this life; what the host has sent to another one is dropped.
        argv: the program and its arguments; without any, SHELL of `environment`, or /bin/sh where
            that cannot be run.
        folders: it works in the first that is there.
        environment: what is added to the worker's own.
        size: rows and columns of its terminal; None for pipes.

    Returns:
        The process id of the carrier.

    Raises:
        OSError: EBUSY, there is one already.
    """
    channel = port.Port.find(port.TERMINAL)
    try:
        if carrier := os.fork():
            return carrier
        try:
            with open("/proc/sys/kernel/hostname", "w") as file:
                file.write(_HOSTNAME)
            program = _Program(argv, folders, os.environ | {"PS1": _PROMPT, **environment})
            _Carrier(channel, boot_id, program, size).carry()
        except BaseException as error:
            channel.greet({"failed": wire.encode(error)})
        finally:
            os._exit(0)
    finally:
        channel.close()


def wait(carrier: int) -> None:
    """Waits until a carrier that has told the end has let go of the port, for the next one."""
    with suppress(ChildProcessError):  # it was of a life that is over
        os.waitpid(carrier, 0)


class _Program:
    """What is to run; `become` is for the forked child, and does not return."""

    def __init__(
        self, argv: Sequence[str], folders: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        shell = environment.get("SHELL", "")
        self._argv = list(argv) or [shell if os.access(shell, os.X_OK) else _SHELL]
        self._folders = folders
        self._environment = environment

    def become(self) -> NoReturn:
        """Turns this process into the program."""
        # Python ignores them, and a program would inherit that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        self._go()
        try:
            os.execvpe(self._argv[0], self._argv, self._environment)
        except OSError as error:
            _say(f"{self._argv[0]}: {error.strerror}")
            os._exit(_NOT_FOUND if error.errno == errno.ENOENT else _NOT_RUNNABLE)

    def _go(self) -> None:
        """To the first folder that is there; each that is not was wanted."""
        for folder in self._folders:
            try:
                os.chdir(folder)
            except OSError as error:
                _say(f"{folder}: {error.strerror}")
            else:
                return


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"pyluo: {text}\n".encode(errors="surrogateescape"))


class _Carrier:
    """Between the port and the program, until that ends."""

    def __init__(
        self, channel: port.Port, boot_id: str, program: _Program, size: Size | None
    ) -> None:
        self._channel = channel
        self._boot_id = boot_id
        self._terminal = size is not None
        # Where the program's bytes come from, by the word for them; and where those for it go.
        self._sources: dict[int, str] = {}
        self._feed = -1
        self._pid = self._on_terminal(program, size) if size else self._on_pipes(program)
        self._ended = os.pidfd_open(self._pid)
        for fd in (*self._sources, self._feed):
            os.set_blocking(fd, False)
        self._waiting = b""  # for the program
        self._given = 0  # bytes that the pipe to it holds
        self._eof = False
        self._folder = ""

    def _on_terminal(self, program: _Program, size: Size) -> int:
        pid, master = os.forkpty()
        if not pid:
            termios.tcsetwinsize(0, size)
            program.become()
        self._sources[master] = "output"
        self._feed = os.dup(master)  # so that each of the two is waited for by itself
        return pid

    def _on_pipes(self, program: _Program) -> int:
        (reads, self._feed), (output, writes), (errors, complains) = (os.pipe() for _ in range(3))
        # With a single slot, a pipe has room again when all that it held is read.
        fcntl.fcntl(self._feed, fcntl.F_SETPIPE_SZ, _PIECE)
        if not (pid := os.fork()):
            os.setsid()
            for number, fd in enumerate((reads, writes, complains)):
                os.dup2(fd, number)
            program.become()
        for fd in (reads, writes, complains):
            os.close(fd)
        self._sources |= {output: "output", errors: "error"}
        return pid

    def carry(self) -> None:
        """Carries bytes until the program ends, and tells the host how it did."""
        self._channel.greet({})
        active = True
        while True:
            ready = self._wait(active)
            active = bool(ready)
            if ready.get(self._channel.fileno()):
                self._obey()
            if ready.get(self._feed):
                self._give(ready[self._feed])
            for fd in [fd for fd in self._sources if fd in ready]:
                self._relay(fd)
            self._look()
            if self._ended in ready:
                break
        # What it leaves running in the background is not waited for.
        for fd in list(self._sources):
            while self._relay(fd):
                pass
        _, status = os.waitpid(self._pid, 0)
        self._channel.send({"end": os.waitstatus_to_exitcode(status)})

    def _wait(self, active: bool) -> dict[int, int]:
        """What is ready. Shortly after something was, the program may be in another folder, which
        it tells nobody."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        if len(self._waiting) < _ROOM:
            poll.register(self._channel.fileno(), select.POLLIN)
        for fd in self._sources:
            poll.register(fd, select.POLLIN)
        if self._feed >= 0 and (self._waiting or self._given or self._eof):
            poll.register(self._feed, select.POLLOUT)
        return dict(poll.poll(_SHORTLY if active else None))

    def _obey(self) -> None:
        for message in self._channel.receive_some():
            if message.get("boot_id") != self._boot_id:
                continue  # it was for a life that is over
            if (data := message.get("input")) is not None:
                self._waiting += wire.decode(data)
            elif size := message.get("size"):
                self._resize(tuple(size))
            elif message.get("eof"):
                self._eof = True

    def _resize(self, size: Size) -> None:
        for fd, what in self._sources.items():
            if self._terminal and what == "output":
                termios.tcsetwinsize(fd, size)

    def _give(self, event: int) -> None:
        """Writes a line, or what there is room for, to the program: with a pipe, only when it has
        read what was written before, and the host is told so. So a script can go on in the next
        life after the line that jumped."""
        if self._given:
            self._channel.send({"taken": self._given})
            self._given = 0
        if event & _GONE:
            self._waiting, self._eof = b"", True  # nobody will read it
        if self._waiting:
            line = self._waiting.find(b"\n") + 1 or len(self._waiting)
            piece = self._waiting[: min(line, _PIECE)]
            with suppress(BlockingIOError, BrokenPipeError):
                written = os.write(self._feed, piece)
                self._waiting = self._waiting[written:]
                self._given = 0 if self._terminal else written
        elif self._eof:
            os.close(self._feed)
            self._feed = -1

    def _relay(self, fd: int) -> bool:
        """Passes on what there is to read; whether there was something."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # which a terminal gives when nobody has it open
                raise
            data = b""
        if data:
            self._channel.send({self._sources[fd]: wire.encode(data)})
        else:
            del self._sources[fd]
            os.close(fd)
        return bool(data)

    def _look(self) -> None:
        """Tells the host where the program is, if it has moved."""
        with suppress(OSError):  # it has ended
            folder = os.readlink(f"/proc/{self._pid}/cwd")
            if folder != self._folder:
                self._folder = folder
                self._channel.send({"folder": folder})
