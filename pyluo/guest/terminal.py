"""Run a program in the guest whose input and output are those of a process on the host.

The program runs on a pseudoterminal if the host's process has a terminal, else on pipes. A separate
process in the guest, the relay, copies the bytes, so that neither the worker nor the program waits
for the other. The relay exchanges messages (see `wire`) with the host over a port of its own:

| to the guest | |
| --- | --- |
| `input` | bytes for the program |
| `eof` | the program's input ends here |
| `size` | rows and columns of the host's terminal |

| to the host | |
| --- | --- |
| `output`, `error` | bytes from the program |
| `taken` | how many more bytes of its input the program has read, if that is a pipe |
| `folder` | the program's current folder |
| `end` | the program's exit status, or the negative number of the signal that ended it |
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
# The prompt of a shell without a start file; the default prompt would look like the host's. (With
# Debian's start file, bash shows the host name in its prompt.)
_PROMPT = "guest:$PWD# "
_SHELL = "/bin/sh"
_CHUNK = 1 << 14  # bytes of output in a message, at most
_PIECE = 1 << 12  # bytes written to the program at a time, at most: a page, or one slot of a pipe
_INPUT_LIMIT = 1 << 16  # bytes of input in the relay's buffer, after which it stops reading
_FOLDER_POLL = 100  # milliseconds
_NOT_RUNNABLE, _NOT_FOUND = 126, 127  # the exit statuses of shells for these cases
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


def start(
    boot_id: str,
    argv: Sequence[str],
    folders: Sequence[str],
    environment: Mapping[str, str],
    size: Size | None,
) -> int:
    """Start a program, and the relay of its input and output.

    Args:
        boot_id: the boot id of this life; messages that the host sent to another life are dropped.
        argv: the program and its arguments; if empty, the program that SHELL in `environment`
            names, or /bin/sh if that one cannot be run.
        folders: the program starts in the first of these folders that exists.
        environment: variables to add to the worker's environment.
        size: the rows and columns of the program's terminal; None to run the program on pipes.

    Returns:
        The process id of the relay.

    Raises:
        OSError: another relay is running (EBUSY).
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
    """Wait until a relay has ended and has closed its port, so that `start` can open it again.

    Args:
        relay_pid: the process id of the relay; it has reported the end of its program.
    """
    with suppress(ChildProcessError):  # the relay belonged to an earlier life
        os.waitpid(relay_pid, 0)


class _Program:
    """The program to run: its arguments, its folder and its environment."""

    def __init__(
        self, argv: Sequence[str], folders: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        shell = environment.get("SHELL", "")
        self._argv = list(argv) or [shell if os.access(shell, os.X_OK) else _SHELL]
        self._folders = folders
        self._environment = environment

    def exec(self) -> NoReturn:
        """Execute the program in this process, which is a forked child; this does not return."""
        # Python ignores these signals. The program would inherit this, and may need their defaults.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        self._change_folder()
        try:
            os.execvpe(self._argv[0], self._argv, self._environment)
        except OSError as error:
            _print_error(f"{self._argv[0]}: {error.strerror}")
            os._exit(_NOT_FOUND if error.errno == errno.ENOENT else _NOT_RUNNABLE)

    def _change_folder(self) -> None:
        """Change to the first folder that exists; report each folder before it on stderr."""
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
    """Starts the program, and copies bytes between it and the port until the program ends."""

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
        # A pipe with a single slot is writable again only after everything in it was read.
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
        """Copy bytes until the program ends, and report its exit status to the host."""
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
        # Forward what is left of the program's output. Do not wait for the end of the output,
        # because processes that the program left in the background may still have it open.
        for fd in list(self._sources):
            while self._forward_output(fd):
                pass
        _, status = os.waitpid(self._pid, 0)
        self._channel.send({"end": os.waitstatus_to_exitcode(status)})

    def _poll(self, active: bool) -> dict[int, int]:
        """Wait until a descriptor is ready, and return poll(2)'s events by descriptor.

        Args:
            active: whether something was ready the last time. If so, this waits only for a moment
                and may return nothing, because the program may then have changed its folder, and
                no event tells of that.
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
                continue  # the host sent it to an earlier life
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
        """Write at most one line of the pending input to the program.

        A line is written to a pipe only after the program has read the line before; then the host
        is told how many bytes were read. So if a line of a script jumps, the host knows with which
        line the script continues in the next life.

        Args:
            event: the events that poll(2) returned for the program's input.
        """
        if self._unread_in_pipe:
            self._channel.send({"taken": self._unread_in_pipe})
            self._unread_in_pipe = 0
        if event & _GONE:
            self._pending_input, self._eof = b"", True  # the program has closed its input
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
        """Forward output of the program to the host, and return whether there was any.

        Args:
            fd: the descriptor to read from; it is closed at the end of the output.
        """
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: no process has the terminal open any more
                raise
            data = b""
        if data:
            self._channel.send({self._sources[fd]: wire.encode(data)})
        else:
            del self._sources[fd]
            os.close(fd)
        return bool(data)

    def _report_folder(self) -> None:
        """Send the program's current folder to the host if it changed."""
        with suppress(OSError):  # the program has ended
            folder = os.readlink(f"/proc/{self._pid}/cwd")
            if folder != self._folder:
                self._folder = folder
                self._channel.send({"folder": folder})
