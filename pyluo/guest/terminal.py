"""A program in the guest that runs on the host's terminal, or on the host's pipes.

A process of its own relays the bytes, so that neither the worker nor the program waits for the
other. It sends the frames of `wire` over a port of its own:

| to the guest | |
| --- | --- |
| `input` | bytes for the program |
| `eof` | there are no more bytes for it |
| `size` | rows and columns of the host's terminal |

| to the host | |
| --- | --- |
| `output`, `error` | bytes from the program |
| `taken` | how many more bytes of a pipe the program has read |
| `folder` | the program's current folder |
| `end` | the program's exit status, or the negative number of a signal that ended it |
| `failed` | the exception that ended the relay |
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
# The prompt of a shell without a start file would look like the host's. (Debian's start file for
# bash shows the name of the machine.)
_PROMPT = "guest:$PWD# "
_SHELL = "/bin/sh"
_CHUNK = 1 << 14  # bytes of output in a frame
_PIECE = 1 << 12  # bytes written to the program at a time: a page, which is a slot of a pipe
_INPUT_LIMIT = 1 << 16  # bytes of input that are buffered here
_FOLDER_POLL = 100  # milliseconds
_NOT_RUNNABLE, _NOT_FOUND = 126, 127  # as in shells
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


def start(
    boot_id: str,
    argv: Sequence[str],
    folders: Sequence[str],
    environment: Mapping[str, str],
    size: Size | None,
) -> int:
    """Start a program, and a process that relays its input and output.

    Args:
        boot_id: the boot id of this life; messages that the host sent to another one are dropped.
        argv: the program and its arguments; by default SHELL of `environment`, or /bin/sh if that
            cannot be run.
        folders: the program starts in the first of these that exists.
        environment: variables to add to the worker's own.
        size: the rows and columns of the program's terminal; None for pipes.

    Returns:
        The process id of the relay.

    Raises:
        OSError: a relay is running already (EBUSY).
    """
    channel = port.Port.find(port.TERMINAL)
    try:
        if relay_pid := os.fork():
            return relay_pid
        try:
            with open("/proc/sys/kernel/hostname", "w") as file:
                file.write(_HOSTNAME)
            program = _Program(argv, folders, os.environ | {"PS1": _PROMPT, **environment})
            _Relay(channel, boot_id, program, size).run()
        except BaseException as error:
            channel.send_first({"failed": wire.encode(error)})
        finally:
            os._exit(0)
    finally:
        channel.close()


def wait(relay_pid: int) -> None:
    """Wait until a relay that reported the program's end has closed the port, for the next one."""
    with suppress(ChildProcessError):  # it was a process of an earlier life
        os.waitpid(relay_pid, 0)


class _Program:
    """The program to run."""

    def __init__(
        self, argv: Sequence[str], folders: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        shell = environment.get("SHELL", "")
        self._argv = list(argv) or [shell if os.access(shell, os.X_OK) else _SHELL]
        self._folders = folders
        self._environment = environment

    def exec(self) -> NoReturn:
        """Replace this process, a forked child, by the program; this does not return."""
        # Python ignores these signals, and the program would inherit that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        self._change_folder()
        try:
            os.execvpe(self._argv[0], self._argv, self._environment)
        except OSError as error:
            _print_error(f"{self._argv[0]}: {error.strerror}")
            os._exit(_NOT_FOUND if error.errno == errno.ENOENT else _NOT_RUNNABLE)

    def _change_folder(self) -> None:
        """Change to the first folder that exists, and report each one that does not."""
        for folder in self._folders:
            try:
                os.chdir(folder)
            except OSError as error:
                _print_error(f"{folder}: {error.strerror}")
            else:
                return


def _print_error(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"pyluo: {text}\n".encode(errors="surrogateescape"))


class _Relay:
    """Relays bytes between the port and the program, until the program ends."""

    def __init__(
        self, channel: port.Port, boot_id: str, program: _Program, size: Size | None
    ) -> None:
        self._channel = channel
        self._boot_id = boot_id
        self._terminal = size is not None
        self._sources: dict[int, str] = {}  # the names of the program's outputs, by descriptor
        self._input = -1  # the descriptor of the program's input
        self._pid = (
            self._start_on_terminal(program, size) if size else self._start_on_pipes(program)
        )
        self._ended = os.pidfd_open(self._pid)
        for fd in (*self._sources, self._input):
            os.set_blocking(fd, False)
        self._pending_input = b""
        self._unread_in_pipe = 0  # bytes
        self._eof = False
        self._folder = ""

    def _start_on_terminal(self, program: _Program, size: Size) -> int:
        pid, master = os.forkpty()
        if not pid:
            termios.tcsetwinsize(0, size)
            program.exec()
        self._sources[master] = "output"
        self._input = os.dup(master)  # so that poll(2) reports reading and writing separately
        return pid

    def _start_on_pipes(self, program: _Program) -> int:
        (reads, self._input), (output, writes), (errors, error_writes) = (
            os.pipe() for _ in range(3)
        )
        # A pipe with a single slot has room again only when everything in it was read.
        fcntl.fcntl(self._input, fcntl.F_SETPIPE_SZ, _PIECE)
        if not (pid := os.fork()):
            os.setsid()
            for number, fd in enumerate((reads, writes, error_writes)):
                os.dup2(fd, number)
            program.exec()
        for fd in (reads, writes, error_writes):
            os.close(fd)
        self._sources |= {output: "output", errors: "error"}
        return pid

    def run(self) -> None:
        """Relay bytes until the program ends, and report its exit status to the host."""
        self._channel.send_first({})
        active = True
        while True:
            ready = self._poll(active)
            active = bool(ready)
            if ready.get(self._channel.fileno()):
                self._handle_messages()
            if ready.get(self._input):
                self._feed_program(ready[self._input])
            for fd in [fd for fd in self._sources if fd in ready]:
                self._forward_output(fd)
            self._report_folder()
            if self._ended in ready:
                break
        # Processes that it left in the background are not waited for.
        for fd in list(self._sources):
            while self._forward_output(fd):
                pass
        _, status = os.waitpid(self._pid, 0)
        self._channel.send({"end": os.waitstatus_to_exitcode(status)})

    def _poll(self, active: bool) -> dict[int, int]:
        """Wait, and return what is ready.

        After activity it waits only for a moment, because the program may have changed its folder,
        of which nobody is notified.
        """
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        if len(self._pending_input) < _INPUT_LIMIT:
            poll.register(self._channel.fileno(), select.POLLIN)
        for fd in self._sources:
            poll.register(fd, select.POLLIN)
        if self._input >= 0 and (self._pending_input or self._unread_in_pipe or self._eof):
            poll.register(self._input, select.POLLOUT)
        return dict(poll.poll(_FOLDER_POLL if active else None))

    def _handle_messages(self) -> None:
        for message in self._channel.receive_some():
            if message.get("boot_id") != self._boot_id:
                continue  # it was for an earlier life
            if (data := message.get("input")) is not None:
                self._pending_input += wire.decode(data)
            elif size := message.get("size"):
                self._resize(tuple(size))
            elif message.get("eof"):
                self._eof = True

    def _resize(self, size: Size) -> None:
        for fd, what in self._sources.items():
            if self._terminal and what == "output":
                termios.tcsetwinsize(fd, size)

    def _feed_program(self, event: int) -> None:
        """Write a line, or as much as there is room for, to the program.

        Through a pipe, the next line is written only when the program has read the previous one,
        and the host is told so. Thus after a line that jumped, a script can continue in the next
        life.
        """
        if self._unread_in_pipe:
            self._channel.send({"taken": self._unread_in_pipe})
            self._unread_in_pipe = 0
        if event & _GONE:
            self._pending_input, self._eof = b"", True  # the program closed its input
        if self._pending_input:
            line = self._pending_input.find(b"\n") + 1 or len(self._pending_input)
            piece = self._pending_input[: min(line, _PIECE)]
            with suppress(BlockingIOError, BrokenPipeError):
                written = os.write(self._input, piece)
                self._pending_input = self._pending_input[written:]
                self._unread_in_pipe = 0 if self._terminal else written
        elif self._eof:
            os.close(self._input)
            self._input = -1

    def _forward_output(self, fd: int) -> bool:
        """Forward what the program wrote; return whether there was something."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal's answer if no process has it open
                raise
            data = b""
        if data:
            self._channel.send({self._sources[fd]: wire.encode(data)})
        else:
            del self._sources[fd]
            os.close(fd)
        return bool(data)

    def _report_folder(self) -> None:
        """Tell the host the program's folder, if it changed."""
        with suppress(OSError):  # the program has ended
            folder = os.readlink(f"/proc/{self._pid}/cwd")
            if folder != self._folder:
                self._folder = folder
                self._channel.send({"folder": folder})
