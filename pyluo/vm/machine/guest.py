"""A running guest in an asyncio program: requests and answers, jumps, and the guest's end."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

from qemu.qmp import QMPClient, QMPError

from pyluo.guest import wire
from pyluo.vm.errors import Death, GuestCrash, HarnessError, KernelComplaint
from pyluo.vm.machine import postmortem, timeline
from pyluo.vm.machine.console import Console
from pyluo.vm.machine.lives import Lives
from pyluo.vm.machine.postmortem import Postmortem
from pyluo.vm.machine.qemu import Machine, QemuProcess
from pyluo.vm.machine.timeline import VmEvent, VmEvents
from pyluo.vm.machine.trace import trace
from pyluo.vm.machine.vitals import Vitals
from pyluo.vm.machine.watch import Watch

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from pyluo.vm.errors import Cause
    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["Guest"]

_MESSAGE_LIMIT = 1 << 30  # bytes
# Seconds for a line of the kernel's log to appear on the console, at least: in a slow guest it may
# take as long as the guest may be silent.
_NOTE_TIMEOUT = 10.0
_QMP_TIMEOUT = 60.0  # seconds for QEMU to carry out a command
_DISCONNECT_LIMIT = 5.0  # seconds
# A guest counts as hung if it gives no sign of life for _SILENCE_FACTOR times as long as its cold
# boot took, but for at least _SILENCE_LEAST seconds.
_SILENCE_FACTOR, _SILENCE_LEAST = 4, 10.0


class Guest:
    """A guest: a QEMU process, the console, and the connection to the worker in the guest.

    All methods must be called in one event loop.

    Args:
        machine: the machine that QEMU emulates.
        kernel: the kernel that boots.
        expected: the complaints of the kernel, and the deaths, that do not count as failures.
        silence: seconds without a sign of life after which the guest counts as hung; None for a
            limit that follows from the duration of the cold boot.
        vmcores: the folder to which the guest's memory is dumped if it dies; None for no dump.

    Attributes:
        process: QEMU's process.
        console: the guest's serial console.
        lives: the lives of the guest so far.
        watch: decides when the guest is dead.
        on_event: is called with the timeline after each of its events, in the event loop's thread.
    """

    def __init__(
        self,
        machine: Machine,
        kernel: Kernel,
        expected: frozenset[Cause],
        silence: float | None = None,
        vmcores: Path | None = None,
    ) -> None:
        self.process: QemuProcess = QemuProcess(machine)
        self.console: Console = Console(
            self._note_new_kernel,
            lambda report: self.watch.take_report(report),
            lambda report: self.watch.take_fatal_report(report),
        )
        self.lives: Lives = Lives(kernel, self.console)
        self._qmp = QMPClient("pyluo")
        # It logs the end of its tasks as errors, and all that matters here is raised.
        self._qmp.logger.setLevel(logging.CRITICAL + 1)
        self._vitals = Vitals(self.console)
        self.watch: Watch = Watch(
            self.process,
            self.console,
            self._qmp,
            self._vitals,
            self.lives,
            Postmortem(self.process, self.console, self._qmp, self._vitals, vmcores),
        )
        self.watch.expected = expected
        self.watch.death.add_done_callback(lambda _: self._report_change())
        self._silence = silence
        self._on_change: Callable[[], None] | None = None
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[wire.Message]] = {}
        self._turn = asyncio.Lock()
        self._hello: asyncio.Future[wire.Message] = asyncio.get_running_loop().create_future()
        self._started = time.monotonic()
        self._events: list[timeline.Event] = []
        self._vm_events = VmEvents()
        self.on_event: Callable[[timeline.Timeline], None] = lambda _: None
        self._writers: list[asyncio.StreamWriter] = []
        self._console_transport: asyncio.ReadTransport | None = None
        self._checked_reports = 0

    async def start(self, timeout: float) -> None:
        """Wait until the guest speaks.

        Args:
            timeout: seconds after which a guest that has not spoken counts as dead.

        Raises:
            HarnessError: QEMU did not start.
            GuestCrash: the guest died, or did not speak in time.
        """
        console = asyncio.StreamReader()
        self._console_transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(console), self.process.console
        )
        control, control_writer = await _connect(self.process.sockets["control"])
        heart, heart_writer = await _connect(self.process.sockets["heart"])
        self._writers = [control_writer, heart_writer]
        try:
            await asyncio.wait_for(self.process.wait_for_start(), timeout)
        except TimeoutError:
            raise HarnessError(f"QEMU did not start within {timeout:g} s") from None
        reading = self.watch.spawn(self.console.read(console))
        self.watch.spawn(self._read_messages(control))
        self.watch.spawn(self._vitals.listen(heart, heart_writer))
        self.watch.watch_process(reading)
        try:
            connected = asyncio.ensure_future(self._qmp.connect(self.process.sockets["qmp"]))
            await self.watch.wait_for(connected, timeout, Death.QEMU, "its monitor did not answer")
        except QMPError as error:
            raise self.watch.explain_failed_start() from error
        self.watch.watch_monitor()
        await self._begin_life(timeout)
        boot = time.monotonic() - self._started
        self.watch.watch_for_silence(self._silence or max(_SILENCE_LEAST, _SILENCE_FACTOR * boot))

    async def request(self, message: wire.Message, timeout: float) -> wire.Message:
        """Send a request to the worker, and return its answer; one request runs at a time.

        The answer is not decoded here, so that an exception in it is raised in the caller's thread.

        Raises:
            GuestCrash: the guest died, or did not answer within `timeout` seconds.
        """
        async with self._turn:
            answer = await self._send(message)
            what = f"{message['do']} got no answer"
            return await self.watch.wait_for(answer, timeout, Death.HANG, what)

    async def jump(
        self, image: str, cmdline: str, kernel: Kernel, timeout: float, *, by_systemctl: bool
    ) -> wire.Message | None:
        """Live-update the guest.

        Args:
            image: the path of the next kernel's image.
            cmdline: the next kernel's command line.
            kernel: the next kernel.
            timeout: seconds after which a guest that has not spoken counts as dead.
            by_systemctl: whether systemd jumps, after it has stopped the services.

        Returns:
            None if the guest jumped; the worker's answer if the guest could not jump and runs on.

        Raises:
            GuestCrash: the guest died on the way, or did not speak in time after the jump.
        """
        async with self._turn:
            if self.watch.dying:
                raise await self.watch.cause_of_death()
            self._started = time.monotonic()
            self._events = []
            self._vm_events.begin_jump()
            before = self._hello
            self._hello = asyncio.get_running_loop().create_future()
            self.lives.begin_jump(kernel)
            landed = False
            try:
                request = {"do": "jump", "image": image, "cmdline": cmdline}
                answer = await self._send({**request, "by_systemctl": by_systemctl})
                first = asyncio.ensure_future(_first(answer, self._hello))
                await self.watch.wait_for(
                    first, timeout, Death.LANDING, "no word from the next kernel"
                )
                landed = self._hello.done()
                if not landed:
                    return answer.result()
                self.lives.land()
                await self._begin_life(timeout)
                return None
            finally:
                self.lives.end_jump()
                # If the jump was refused or the caller gave up, do not wait for the hello of the
                # next kernel. If one comes later, the guest counts as having jumped by itself.
                if not landed:
                    self._hello = before

    async def notify(self, on_change: Callable[[], None] | None) -> None:
        """Set the function to call when the guest dies or jumps by itself; None for no function."""
        self._on_change = on_change

    async def monitor(self, command: str, arguments: dict[str, object]) -> object:
        """Run a command of QEMU's monitor, and return QEMU's answer.

        Raises:
            qemu.qmp.ExecuteError: QEMU refused the command.
            GuestCrash: QEMU has ended, or does not answer.
        """
        if self.watch.dying:
            raise await self.watch.cause_of_death()
        done = asyncio.ensure_future(self._qmp.execute(command, arguments or None))
        what = f"{command} got no answer"
        return await self.watch.wait_for(done, _QMP_TIMEOUT, Death.QEMU, what)

    async def dump(self, path: str) -> None:
        """Write the guest's memory to a file, as an ELF core; the guest may be dead.

        Raises:
            HarnessError: QEMU has ended, or could not write the file.
        """
        await postmortem.dump_memory(self._qmp, path)

    async def wait_for_note(self, words: str, since: int) -> bool:
        """Wait until a line that the guest wrote to the kernel's log appears on the console.

        Args:
            words: words of the line.
            since: how many of the first lines of the console to ignore.

        Returns:
            Whether the line has appeared in time.
        """
        silence = self.watch.silence
        limit = max(_NOTE_TIMEOUT, silence) if silence < float("inf") else _NOTE_TIMEOUT
        return await self.console.wait_for_words(words, since, limit)

    def ignore_reports(self) -> None:
        """Make the next `check` ignore the reports so far, because another failure is raised."""
        self._checked_reports = len(self.console.reports)
        self.take_regressions()

    async def check(self, expected: frozenset[Cause]) -> None:
        """Raise an error if the kernel has printed an unexpected report since the last check.

        Args:
            expected: causes that are expected in addition to those that `Guest` was given.

        Raises:
            KernelComplaint: the kernel complained of something unexpected.
            GuestCrash: the guest died of something unexpected, and no caller was told yet.
            HarnessError: the watch over the guest failed, and no caller was told yet.
        """
        expected |= self.watch.expected
        if self.watch.dying:
            death_raised, end = self.watch.death_raised, await self.watch.cause_of_death()
            died_of = {end.cause} if isinstance(end, GuestCrash) else set()
            if not death_raised and not died_of & expected:
                raise end
            expected |= died_of
        since, self._checked_reports = self._checked_reports, len(self.console.reports)
        # If the guest is dead, the reports that came during its last request belong to the death.
        until = self.watch.reports_before_request if self.watch.dying else None
        for report in self.console.reports[since:until]:
            if report.complaint not in expected:
                await self.console.wait_for_pause(postmortem.TRACE_PAUSE, postmortem.TRACE_LIMIT)
                kernel = self.lives.kernel_of(report.life)
                raise KernelComplaint(
                    report.complaint,
                    report.reason,
                    kernel=kernel.name,
                    life=report.life,
                    console=self.console.tail(),
                    trace=await asyncio.to_thread(trace, report.lines, kernel),
                )

    @property
    def timeline(self) -> timeline.Timeline:
        """The events since the guest was started, or since the last time it was told to jump."""
        of_vms = self._vm_events.of_last_jump()
        return timeline.Timeline(self._started, tuple(self._events), of_vms)

    def take_regressions(self) -> list[str]:
        """Return what the VMs in the guest went back in, a sentence each, and forget it."""
        found = self._vm_events.regressions[:]
        del self._vm_events.regressions[: len(found)]
        return found

    async def close(self) -> None:
        """Kill QEMU and close all channels."""
        try:
            await self.watch.close()
            await self._disconnect()
            if self._console_transport is not None:
                self._console_transport.close()
            for writer in self._writers:
                writer.transport.abort()
        finally:
            await asyncio.to_thread(self.process.close)

    async def _disconnect(self) -> None:
        """Disconnect from QEMU's monitor, if that is possible: QEMU must end in any case."""
        try:
            await asyncio.wait_for(self._qmp.disconnect(), _DISCONNECT_LIMIT)
        except asyncio.CancelledError:
            # qemu.qmp also raises this when its own tasks end, and nobody has cancelled this one.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        except Exception:
            return

    async def _send(self, message: wire.Message) -> asyncio.Future[wire.Message]:
        """Send a request to the worker of the current life; return a future for its answer."""
        if self.watch.dying:
            raise await self.watch.cause_of_death()
        assert self.lives.current is not None
        number = next(self._ids)
        answer: asyncio.Future[wire.Message] = asyncio.get_running_loop().create_future()
        self._answers = {number: answer}
        line = wire.to_line({"id": number, "boot_id": self.lives.current.boot_id, **message})
        # The line break ends an earlier message that a jump may have cut off.
        self._writers[0].write(b"\n" + line)
        return answer

    async def _begin_life(self, timeout: float) -> None:
        hello = await self.watch.wait_for(
            self._hello, timeout, Death.SILENT, "no word from the worker"
        )
        blackout = None
        with suppress(KeyError):  # this is the cold boot, or the guest jumped by itself meanwhile
            blackout = self.timeline.blackout
        self.lives.enter(hello, blackout)
        if problem := hello.get("problem"):
            raise HarnessError(problem)

    async def _read_messages(self, stream: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):  # QEMU has ended
            while line := await stream.readline():
                if message := wire.parse(line):
                    self._take_message(message)

    def _take_message(self, message: wire.Message) -> None:
        if (mark := message.get("mark")) and "vm" in message:
            readings = message["clock"], message["counter"]
            self._vm_events.add(VmEvent(message["vm"], mark, time.monotonic(), *readings))
        elif mark:
            self._add_event(mark, time.monotonic())
        elif hello := message.get("hello"):
            self._add_event(timeline.WORKER_UP, time.monotonic())
            self._take_hello(hello)
        else:
            answer = self._answers.pop(message.get("answer", 0), None)
            if answer and not answer.done():  # it is done if the caller has given up
                answer.set_result(message)

    def _take_hello(self, hello: wire.Message) -> None:
        if not self._hello.done():
            self._hello.set_result(hello)
            return
        # The guest jumped by itself. Pending requests will get no answer, because their life ended.
        left = self.console.left
        self.lives.land_unasked(hello["release"])
        self.lives.enter(hello, time.monotonic() - left if left else None)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(
                    HarnessError("the guest booted again on its own", "jump by vm.live_update()")
                )
        self._report_change()

    def _report_change(self) -> None:
        if self._on_change:
            self._on_change()

    def _note_new_kernel(self, at: float) -> None:
        self.lives.note_new_kernel()
        self._add_event(timeline.NEW_KERNEL, at)

    def _add_event(self, name: str, at: float) -> None:
        self._events.append(timeline.Event(name, at))
        # Not from here: what it raises would end the reading of what the guest says.
        asyncio.get_running_loop().call_soon(self.on_event, self.timeline)


async def _connect(
    channel: socket.socket,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=channel, limit=_MESSAGE_LIMIT)


async def _first(*futures: asyncio.Future[wire.Message]) -> wire.Message:
    done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()
