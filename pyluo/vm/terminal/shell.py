"""Run a program in a guest on the terminal or the pipes of this process, across live updates."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import threading
import tty
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from pyluo.errors import RequestError
from pyluo.guest import terminal, wire
from pyluo.vm.terminal.escape import HELP, Command, Keys
from pyluo.vm.terminal.line import Line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType
    from typing import NoReturn

    from pyluo.vm.machine.lives import Life
    from pyluo.vm.machine.vm import VM

__all__ = ["Shell"]

_ENVIRONMENT = (
    "COLORTERM", "EDITOR", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "PAGER", "SHELL", "TERM", "TZ",
    "VIRTUAL_ENV",
)  # fmt: skip
_CHUNK = 1 << 14
_INPUT_LIMIT = 1 << 16  # bytes of input that the program has not read, after which no more is read
_SIGNALLED = 128  # added to the number of the signal that ended a program, as shells do
_ENDING = signal.SIGTERM, signal.SIGHUP  # the signals that end this process


class Shell:
    """Runs a program in a guest, and starts it again after each jump.

    If stdin is a terminal, the program runs on a terminal too and gets every key, except commands
    that begin with the escape key (see `escape`). Otherwise the program runs on pipes, and input
    that it did not read before a jump is sent again after the jump.

    Args:
        vm: the guest.
        argv: the program and its arguments; if empty, the program that SHELL names on the host, or
            /bin/sh if the guest cannot run that one.
        stdin: the descriptor of the input.
        stdout: the descriptor for the program's output.
        stderr: the descriptor for the messages of the harness, and for the program's error output
            if the program runs on pipes.
    """

    def __init__(
        self, vm: VM, argv: Sequence[str] = (), *, stdin: int = 0, stdout: int = 1, stderr: int = 2
    ) -> None:
        self._vm = vm
        self._argv = list(argv)
        self._stdin = stdin
        self._outputs = {"output": stdout, "error": stderr}
        self._terminal = os.isatty(stdin)
        self._line = Line(vm.terminal)
        self._keys = Keys()
        self._typed = b""  # keys that were typed during a jump and not sent yet
        self._unread = b""  # bytes that were sent to the program's pipe and not read by it yet
        self._eof = False
        self._folders = [vm.path(os.getcwd()), "/"]
        self._jump: Future[object] | None = None
        self._boot_id = ""
        self._relay_pid = 0  # the process id of the relay in the guest
        self._status: int | None = None
        self._resized = False
        self._in_line = False  # whether the last output did not end its line
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def run(self) -> int:
        """Run the program until it ends; this must be called in the main thread.

        Returns:
            The program's exit status, or 128 plus the number of the signal that ended the program;
            0 if the user ended the guest with the escape key.

        Raises:
            GuestCrash: the guest died.
            SystemExit: this process received SIGTERM or SIGHUP.
        """
        with ExitStack() as stack:
            stack.callback(self._woken.close)
            stack.callback(self._waker.close)
            stack.enter_context(_signal_handlers(dict.fromkeys(_ENDING, _end)))
            stack.enter_context(self._vm.notifying(self._wake))
            if self._terminal:
                stack.enter_context(_signal_handlers({signal.SIGWINCH: self._on_resize}))
                stack.enter_context(_raw_terminal(self._stdin))
                stack.callback(self._end_line)
            self._start_program()
            if self._terminal:
                self._print_messages(f"{_describe(self._vm.life)}; Ctrl-] ? for help")
            while self._status is None:
                self._handle_events()
            if self._vm.running and self._jump is None:
                self._vm.call(terminal.wait, self._relay_pid)
        return self._status

    def _handle_events(self) -> None:
        """Wait for input, output, or a wakeup by another thread or a signal, and handle it."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if not self._line.closed:
            poll.register(self._line, select.POLLIN | (select.POLLOUT if self._line.unsent else 0))
        if not self._eof and self._line.unsent + len(self._unread) < _INPUT_LIMIT:
            poll.register(self._stdin, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._line.fileno() in ready:
            self._line.flush()
            self._take_messages(self._line.receive())
        if self._woken.fileno() in ready:
            self._handle_wakeup()
        if self._stdin in ready and self._status is None:
            self._read_input()

    def _start_program(self) -> None:
        """Start the program in the current life of the guest."""
        self._boot_id = self._vm.boot_id
        self._line.begin_life(self._boot_id)
        size = os.get_terminal_size(self._stdin) if self._terminal else None
        self._relay_pid = self._vm.call(
            terminal.start,
            self._boot_id,
            self._argv,
            self._folders,
            _environment(),
            (size.lines, size.columns) if size else None,
        )
        if self._unread:
            self._line.send(input=wire.encode(self._unread))
        if self._eof:
            self._line.send(eof=True)
        self._send_keys(b"")

    def _take_messages(self, messages: list[wire.Message]) -> None:
        for message in messages:
            for what, content in message.items():
                match what:
                    case "output" | "error":
                        self._write_output(what, wire.decode(content, find=wire.resolve_loaded))
                    case "taken":
                        self._unread = self._unread[content:]
                    case "folder":
                        self._folders = [content, *self._folders[-2:]]
                    case "end":
                        self._status = content if content >= 0 else _SIGNALLED - content
                    case "failed":
                        raise wire.decode(content, find=wire.resolve_loaded)

    def _read_input(self) -> None:
        """Read input, send it to the guest, and carry out the commands in it."""
        try:
            data = os.read(self._stdin, _CHUNK)
        except OSError:
            if not self._terminal:
                raise
            data = b""
        if not data and self._terminal:  # the terminal has hung up
            _end(signal.SIGHUP)
        elif not data:
            self._eof = True
            self._line.send(eof=True)
        elif self._terminal:
            for part in self._keys.split(data):
                if self._status is not None:
                    break  # a command has ended the guest
                if isinstance(part, Command):
                    self._run_command(part)
                else:
                    self._send_keys(part)
        else:
            self._unread += data
            self._line.send(input=wire.encode(data))

    def _send_keys(self, data: bytes) -> None:
        """Send keys to the program; during a jump, keep them until it is over."""
        self._typed += data
        if self._typed and self._jump is None:
            self._line.send(input=wire.encode(self._typed))
            self._typed = b""

    def _run_command(self, command: Command) -> None:
        if command is Command.HELP:
            self._print_messages(*HELP.splitlines())
        elif command is Command.QUIT:
            self._status = 0
            self._vm.close()  # this also ends a jump that is going on
        elif self._jump is None:
            self._print_messages("live update")
            self._jump = Future()
            # A daemon thread, so that this process can end during a jump.
            threading.Thread(target=self._live_update, args=[self._jump], daemon=True).start()

    def _live_update(self, done: Future[object]) -> None:
        try:
            done.set_result(self._vm.live_update())
        except BaseException as error:
            done.set_exception(error)
        self._wake()

    def _handle_wakeup(self) -> None:
        """Handle the end of a jump, the death of the guest, or a new size of the terminal."""
        self._woken.recv(_CHUNK)
        if self._resized:
            self._resized = False
            size = os.get_terminal_size(self._stdin)
            self._line.send(size=[size.lines, size.columns])
        if self._jump is not None:
            if self._jump.done():
                self._end_jump(self._jump)
        elif self._vm.dead:
            self._vm.call(os.getpid)  # raises the GuestCrash
        elif self._vm.boot_id != self._boot_id:
            self._begin_life()

    def _end_jump(self, jump: Future[object]) -> None:
        self._jump = None
        try:
            jump.result()
        except RequestError as error:
            self._print_messages(f"refused: {error}")
            self._send_keys(b"")
        else:
            self._begin_life()

    def _begin_life(self) -> None:
        self._take_messages(self._line.drain())  # the last messages of the previous life
        self._status = None
        self._print_messages(_describe(self._vm.life))
        self._start_program()

    def _print_messages(self, *lines: str) -> None:
        """Print messages of the harness, each on a line of its own."""
        self._end_line()
        end = "\r\n" if self._terminal else "\n"
        text = "".join(f"[{line}]{end}" for line in lines)
        _write(self._outputs["error"], text.encode(errors="surrogateescape"))

    def _end_line(self) -> None:
        if self._terminal and self._in_line:
            self._in_line = False
            with suppress(OSError):  # the terminal may be gone
                _write(self._outputs["error"], b"\r\n")

    def _write_output(self, what: str, data: bytes) -> None:
        self._in_line = not data.endswith(b"\n")
        _write(self._outputs[what], data)

    def _wake(self) -> None:
        with suppress(OSError):  # the socket is full of wakeups already, or `run` has ended
            self._waker.send(b"\0")

    def _on_resize(self, number: int, frame: FrameType | None) -> None:
        self._resized = True
        self._wake()


def _describe(life: Life) -> str:
    words = [f"life {life.number}: Linux {life.release}"]
    if life.updates is not None:
        words.append(f"{life.updates} live update{'' if life.updates == 1 else 's'}")
    if life.blackout is not None:
        words.append(f"blackout {life.blackout:.1f} s")
    return ", ".join(words)


def _environment() -> dict[str, str]:
    """Return environment variables for the program; PATH contains the folder of `pyluo`."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    folders = [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    return kept | {"PATH": os.pathsep.join([*folders, "/usr/local/sbin", "/usr/sbin", "/sbin"])}


def _end(number: int, frame: FrameType | None = None) -> NoReturn:
    raise SystemExit(_SIGNALLED + number)


@contextmanager
def _signal_handlers(handlers: dict[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    """Set signal handlers in the block; restore the old ones after the block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _raw_terminal(fd: int) -> Iterator[None]:
    """Put a terminal into raw mode in the block, in which it does not change keys and output."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        with suppress(termios.error):  # the terminal has hung up
            # TCSADRAIN would wait for ever if the user has stopped the output with Ctrl-S.
            termios.tcsetattr(fd, termios.TCSANOW, before)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
