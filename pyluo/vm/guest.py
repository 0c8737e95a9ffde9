"""A running guest, as an asyncio program sees it: what it says, what it answers, how it dies."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import Message, QMPClient, QMPError

from pyluo.guest import wire
from pyluo.vm import timeline
from pyluo.vm.console import Console
from pyluo.vm.errors import Death, GuestCrash, HarnessError
from pyluo.vm.qemu import Machine, QemuProcess

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

__all__ = ["Guest", "Life"]

T = TypeVar("T")
_LINE_LIMIT = 1 << 30  # bytes of one message
_PANIC_GRACE = 3.0  # seconds for the console to say what QMP announced
_CONSOLE_GRACE = 2.0  # seconds for the rest of the console to be read after QEMU's end
_MONITOR_TIMEOUT = 60.0  # seconds for QEMU to carry out a command


@dataclass(frozen=True, slots=True)
class Life:
    """One kernel's time in a guest, from its boot to the jump.

    Attributes:
        number: 1 for the cold boot; each jump begins another.
        kernel: the name of the kernel, as the harness was given it.
        boot_id: the kernel's own name for this boot.
        release: the kernel's release, as `uname -r` gives it.
        updates: the number of live updates that the kernel counts; None if its log does not say.
    """

    number: int
    kernel: str
    boot_id: str
    release: str
    updates: int | None


class Guest:
    """QEMU with the kernel in it. Everything here runs in one event loop.

    Attributes:
        console: what the kernel said.
        qmp: the connection to QEMU's monitor.
        life: the current one, once the guest has spoken.
    """

    def __init__(self, machine: Machine, kernel: str) -> None:
        self.process = QemuProcess(machine)
        self.console = Console(self._kernel_began, self._died)
        self.qmp = QMPClient("pyluo")
        self.life: Life | None = None
        self._kernel = kernel
        self._number = 1
        self._next: str | None = None  # the kernel that is being jumped into
        self._next_began = False
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[wire.Frame]] = {}
        self._started = time.monotonic()
        self._events: list[timeline.Event] = []
        self._turn = asyncio.Lock()
        loop = asyncio.get_running_loop()
        self._death: asyncio.Future[GuestCrash | HarnessError] = loop.create_future()
        self._hello: asyncio.Future[wire.Frame] = loop.create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._control: asyncio.StreamWriter | None = None
        self._console_writer: asyncio.StreamWriter | None = None

    async def start(self, timeout: float) -> None:
        """Waits until the worker in the guest speaks.

        Args:
            timeout: in seconds; a guest that has not spoken by then counts as dead.

        Raises:
            HarnessError: QEMU did not start.
            GuestCrash: the guest died first, or never spoke.
        """
        # A writer closes its socket when it is collected, even one that nothing is written to.
        console, self._console_writer = await _connect(self.process.sockets["console"])
        control, self._control = await _connect(self.process.sockets["control"])
        await self.process.started()
        reading = self._spawn(self.console.read(console))
        self._spawn(self._listen(control))
        self._spawn(self._watch_process(reading))
        try:
            connected = asyncio.ensure_future(self.qmp.connect(self.process.sockets["qmp"]))
            await self._until(connected, timeout, Death.QEMU, "its monitor did not answer")
        except QMPError as error:
            raise await self._explain_failed_start() from error
        self._spawn(self._watch_panic())
        await self._next_life(timeout)

    async def request(self, message: wire.Frame, timeout: float) -> wire.Frame:
        """Sends a request to the worker and waits for the answer; requests take turns.

        The answer is left encoded: what it raises is the caller's, and no business of this loop.

        Raises:
            GuestCrash: the guest died, or did not answer within `timeout` seconds.
        """
        async with self._turn:
            answer = await self._send(message)
            what = f"{message['do']} got no answer"
            return await self._until(answer, timeout, Death.HANG, what)

    async def jump(
        self, image: str, cmdline: str, kernel: str, timeout: float
    ) -> wire.Frame | None:
        """Live-updates the guest.

        Returns:
            The worker's answer if the guest could not jump, and runs on; None if it did.

        Raises:
            GuestCrash: the guest died on the way, or the next kernel did not speak in time.
        """
        async with self._turn:
            self._started = time.monotonic()
            self._events = []
            before = self._hello
            self._hello = asyncio.get_running_loop().create_future()
            self._next, self._next_began = kernel, False
            landed = False
            try:
                answer = await self._send({"do": "jump", "image": image, "cmdline": cmdline})
                first = asyncio.ensure_future(_first(answer, self._hello))
                await self._until(first, timeout, Death.SILENT, "no word from the next kernel")
                landed = self._hello.done()
                if not landed:
                    return answer.result()
                self._number, self._kernel = self._number + 1, kernel
                await self._next_life(timeout)
                return None
            finally:
                self._next = None
                # Refused, or given up on: a kernel that comes after all comes unasked.
                if not landed:
                    self._hello = before

    async def monitor(self, command: str, arguments: dict[str, object]) -> object:
        """Runs a command of QEMU's monitor.

        Raises:
            qemu.qmp.ExecuteError: QEMU refused it.
            GuestCrash: QEMU is gone, or does not answer.
        """
        if self._death.done():
            raise self._death.result()
        done = asyncio.ensure_future(self.qmp.execute(command, arguments or None))
        return await self._until(done, _MONITOR_TIMEOUT, Death.QEMU, f"{command} got no answer")

    @property
    def dead(self) -> bool:
        """Whether the guest, or the watch over it, has failed."""
        return self._death.done()

    @property
    def timeline(self) -> timeline.Timeline:
        """What happened since the guest was started, or last asked to jump."""
        return timeline.Timeline(self._started, tuple(self._events))

    async def close(self) -> None:
        """Ends QEMU, whatever state it is in."""
        if not self._death.done():
            self._death.set_result(HarnessError("the guest was closed"))
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            with suppress(Exception):  # whatever its tasks ended in, QEMU is to end now
                await self.qmp.disconnect()
            for writer in (self._console_writer, self._control):
                if writer is not None:
                    writer.transport.abort()
        finally:
            await asyncio.to_thread(self.process.close)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._check)
        self._tasks.append(task)
        return task

    def _check(self, task: asyncio.Task[None]) -> None:
        """A watcher that fails must not leave the guest unwatched in silence."""
        if not task.cancelled() and (error := task.exception()) and not self._death.done():
            failure = HarnessError(f"the harness failed to watch the guest: {error!r}")
            failure.__cause__ = error
            self._death.set_result(failure)

    async def _send(self, message: wire.Frame) -> asyncio.Future[wire.Frame]:
        """Writes a request to the current life; the future gets the answer."""
        if self._death.done():
            raise self._death.result()
        assert self.life is not None
        assert self._control is not None
        number = next(self._ids)
        answer: asyncio.Future[wire.Frame] = asyncio.get_running_loop().create_future()
        self._answers = {number: answer}
        frame = wire.frame({"id": number, "boot_id": self.life.boot_id, **message})
        # The empty line ends what a jump may have cut short.
        self._control.write(b"\n" + frame)
        return answer

    async def _next_life(self, timeout: float) -> None:
        hello = await self._until(self._hello, timeout, Death.SILENT, "no word from the worker")
        self.life = self._life(hello)

    async def _until(
        self, awaited: asyncio.Future[T], timeout: float, death: Death, what: str
    ) -> T:
        """Waits for one of: the result, the death of the guest, the end of patience."""
        either: list[asyncio.Future[Any]] = [awaited, self._death]
        try:
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            awaited.cancel()
            raise
        if awaited.done():
            return awaited.result()
        awaited.cancel()
        if not self._death.done():
            self._died(death, f"{what} within {timeout:g} s")
        raise self._death.result()

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        with suppress(ConnectionResetError):  # QEMU's death, which is an end as well
            while line := await stream.readline():
                if message := wire.parse(line):
                    self._take(message)

    def _take(self, message: wire.Frame) -> None:
        if mark := message.get("mark"):
            self._events.append(timeline.Event(mark, time.monotonic()))
        elif hello := message.get("hello"):
            self._events.append(timeline.Event(timeline.WORKER_UP, time.monotonic()))
            self._greeted(hello)
        elif answer := self._answers.pop(message.get("answer", 0), None):
            answer.set_result(message)

    def _greeted(self, hello: wire.Frame) -> None:
        if not self._hello.done():
            self._hello.set_result(hello)
            return
        # Nobody asked for this jump; who waits for an answer of the last life waits in vain.
        self._number += 1
        self.life = self._life(hello)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(
                    HarnessError("the guest booted again on its own", "jump by vm.live_update()")
                )

    def _life(self, hello: wire.Frame) -> Life:
        return Life(
            self._number, self._kernel, hello["boot_id"], hello["release"], hello["updates"]
        )

    async def _watch_process(self, reading: asyncio.Task[None]) -> None:
        status = await self.process.ended()
        # What the kernel said last explains more than that QEMU is gone.
        await asyncio.wait([reading], timeout=_CONSOLE_GRACE)
        if self.life is None and status > 0:
            error = await self._explain_failed_start()
            if not self._death.done():
                self._death.set_result(error)
        elif status < 0:
            self._died(Death.QEMU, f"killed by {signal.Signals(-status).name}")
        else:
            self._died(Death.QEMU, f"exit status {status}")

    async def _watch_panic(self) -> None:
        with self.qmp.listener("GUEST_PANICKED") as listener:
            event: Message = await listener.get()
            # The console explains it better, unless it stays silent.
            await asyncio.sleep(_PANIC_GRACE)
            self._died(Death.PANIC, f"QEMU reports {event['data']}")

    async def _explain_failed_start(self) -> HarnessError:
        said = self.process.messages_log.read_text(errors="replace").strip()
        return HarnessError("QEMU did not start", said or "it gave no reason")

    def _kernel_began(self, at: float) -> None:
        self._next_began = True
        self._events.append(timeline.Event(timeline.NEW_KERNEL, at))

    def _died(self, death: Death, reason: str) -> None:
        if not self._death.done():
            if death in (Death.HANG, Death.SILENT) and self.console.omen:
                reason += f"; before that the kernel said: {self.console.omen}"
            number, kernel = self._number, self._kernel
            # In a jump the old kernel can die as well, up to the new one's first line.
            if self._next and (self._next_began or death is Death.SILENT):
                number, kernel = number + 1, self._next
            console = self.console.tail()
            crash = GuestCrash(death, reason, kernel=kernel, life=number, console=console)
            self._death.set_result(crash)


async def _connect(
    channel: socket.socket,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=channel, limit=_LINE_LIMIT)


async def _first(*futures: asyncio.Future[wire.Frame]) -> wire.Frame:
    done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()
