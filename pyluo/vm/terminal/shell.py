"""A program in a guest, on the terminal or the pipes of this process, one life after another."""

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

from pyluo.errors import LuoError
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
_WINDOW = 1 << 16  # bytes on their way to the guest, at which no more are read
_SIGNALLED = 128  # as shells have it
_ENDING = signal.SIGTERM, signal.SIGHUP


class Shell:
    """Runs a program in a guest, and starts it afresh in each life that a live update begins.

    On a terminal the program has one too, and everything typed is for it, but for what follows the
    escape key (`pyluo.vm.terminal.escape`). Otherwise it has pipes, and what was not read of its
    input in one life is read in the next.

    Args:
        vm: the guest.
        argv: the program and its arguments; without any, the host's SHELL, or /bin/sh where the
            guest cannot run that.
        stdin: a descriptor; if it is a terminal, the program has one.
        stdout: likewise, for what the program writes.
        stderr: likewise, for what it complains of, if it has no terminal, and for the harness's
            own words.
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
        self._typed = b""  # while a jump is on its way
        self._unread = b""  # what was sent to a pipe and not read there
        self._eof = False
        self._folders = [os.getcwd(), "/"]
        self._jump: Future[object] | None = None
        self._boot_id = ""
        self._carrier = 0  # its process id in the guest
        self._status: int | None = None
        self._resized = False
        self._in_line = False  # the last output did not end its line
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def run(self) -> int:
        """Runs it to its end, in the main thread.

        Returns:
            Its exit status as shells have it, 128 and the number of a signal that ended it; 0 if
            the escape key ended the guest.

        Raises:
            GuestCrash: the guest died.
            SystemExit: SIGTERM or SIGHUP came.
        """
        with ExitStack() as stack:
            stack.callback(self._woken.close)
            stack.callback(self._waker.close)
            stack.enter_context(_handling(dict.fromkeys(_ENDING, _end)))
            stack.enter_context(self._vm.notifying(self._wake))
            if self._terminal:
                stack.enter_context(_handling({signal.SIGWINCH: self._on_resize}))
                stack.enter_context(_raw(self._stdin))
                stack.callback(self._end_line)
            self._begin()
            if self._terminal:
                self._tell(f"{_describe(self._vm.life)}; Ctrl-] ? for help")
            while self._status is None:
                self._go_on()
            if self._vm.running and self._jump is None:
                self._vm.call(terminal.wait, self._carrier)
        return self._status

    def _go_on(self) -> None:
        """Waits for something, and does what it asks for."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if not self._line.closed:
            poll.register(self._line, select.POLLIN | (select.POLLOUT if self._line.waiting else 0))
        if not self._eof and self._line.waiting + len(self._unread) < _WINDOW:
            poll.register(self._stdin, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._line.fileno() in ready:
            self._line.flush()
            self._take(self._line.receive())
        if self._woken.fileno() in ready:
            self._look_up()
        if self._stdin in ready and self._status is None:
            self._read()

    def _begin(self) -> None:
        """Starts the program in the life that runs."""
        self._boot_id = self._vm.boot_id
        self._line.begin(self._boot_id)
        size = os.get_terminal_size(self._stdin) if self._terminal else None
        self._carrier = self._vm.call(
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
        self._type(b"")

    def _take(self, messages: list[wire.Frame]) -> None:
        for message in messages:
            for what, content in message.items():
                match what:
                    case "output" | "error":
                        self._write(what, wire.decode(content, find=wire.resolve_loaded))
                    case "taken":
                        self._unread = self._unread[content:]
                    case "folder":
                        self._folders = [content, *self._folders[-2:]]
                    case "end":
                        self._status = content if content >= 0 else _SIGNALLED - content
                    case "failed":
                        raise wire.decode(content, find=wire.resolve_loaded)

    def _read(self) -> None:
        """Reads what comes in, for the guest or for the host."""
        try:
            data = os.read(self._stdin, _CHUNK)
        except OSError:
            if not self._terminal:
                raise
            data = b""
        if not data and self._terminal:  # it was hung up
            _end(signal.SIGHUP)
        elif not data:
            self._eof = True
            self._line.send(eof=True)
        elif self._terminal:
            for part in self._keys.split(data):
                if self._status is not None:
                    break  # the guest has been ended
                if isinstance(part, Command):
                    self._obey(part)
                else:
                    self._type(part)
        else:
            self._unread += data
            self._line.send(input=wire.encode(data))

    def _type(self, data: bytes) -> None:
        """Passes on what was typed: to the next life, while one is on its way."""
        self._typed += data
        if self._typed and self._jump is None:
            self._line.send(input=wire.encode(self._typed))
            self._typed = b""

    def _obey(self, command: Command) -> None:
        if command is Command.HELP:
            self._tell(*HELP.splitlines())
        elif command is Command.QUIT:
            self._status = 0
            self._vm.close()  # whatever it is at
        elif self._jump is None:
            self._tell("live update")
            self._jump = Future()
            # A daemon: if this process is to end, the jump is no reason to stay.
            threading.Thread(target=self._live_update, args=[self._jump], daemon=True).start()

    def _live_update(self, done: Future[object]) -> None:
        try:
            done.set_result(self._vm.live_update())
        except BaseException as error:
            done.set_exception(error)
        self._wake()

    def _look_up(self) -> None:
        """Something happened elsewhere: a jump, a death, another size of the terminal."""
        self._woken.recv(_CHUNK)
        if self._resized:
            self._resized = False
            size = os.get_terminal_size(self._stdin)
            self._line.send(size=[size.lines, size.columns])
        if self._jump is not None:
            if self._jump.done():
                self._arrive(self._jump)
        elif self._vm.dead:
            self._vm.call(os.getpid)  # raises what it died of
        elif self._vm.boot_id != self._boot_id:
            self._next_life()

    def _arrive(self, jump: Future[object]) -> None:
        self._jump = None
        try:
            jump.result()
        except LuoError as error:
            self._tell(f"refused: {error}")
            self._type(b"")
        else:
            self._next_life()

    def _next_life(self) -> None:
        self._take(self._line.drain())  # what the last life had to say
        self._status = None
        self._tell(_describe(self._vm.life))
        self._begin()

    def _tell(self, *lines: str) -> None:
        """Says something of the harness's own, on lines of its own."""
        self._end_line()
        end = "\r\n" if self._terminal else "\n"
        text = "".join(f"[{line}]{end}" for line in lines)
        _write(self._outputs["error"], text.encode(errors="surrogateescape"))

    def _end_line(self) -> None:
        if self._terminal and self._in_line:
            self._in_line = False
            with suppress(OSError):  # the terminal may be gone
                _write(self._outputs["error"], b"\r\n")

    def _write(self, what: str, data: bytes) -> None:
        self._in_line = not data.endswith(b"\n")
        _write(self._outputs[what], data)

    def _wake(self) -> None:
        with suppress(OSError):  # it is awake, or gone
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
    """What of this process's environment the program is given; it finds pyluo, too."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    folders = [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    return kept | {"PATH": os.pathsep.join([*folders, "/usr/local/sbin", "/usr/sbin", "/sbin"])}


def _end(number: int, frame: FrameType | None = None) -> NoReturn:
    raise SystemExit(_SIGNALLED + number)


@contextmanager
def _handling(handlers: dict[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    """Signals have these handlers in the block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    """In the block, the terminal passes each key on, and each byte of output, as it is."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        with suppress(termios.error):  # it was hung up
            # Not TCSADRAIN: somebody may have stopped the output.
            termios.tcsetattr(fd, termios.TCSANOW, before)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
