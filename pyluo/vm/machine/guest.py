"""A running guest, as an asyncio program sees it: what it says, what it answers, how it dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import Message, QMPClient, QMPError

from pyluo.guest import wire
from pyluo.vm.errors import Death, GuestCrash, HarnessError
from pyluo.vm.machine import timeline
from pyluo.vm.machine.complaint import Report, Severity
from pyluo.vm.machine.console import Console
from pyluo.vm.machine.qemu import Machine, QemuProcess
from pyluo.vm.machine.trace import trace

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["Guest", "Life"]

T = TypeVar("T")
_LINE_LIMIT = 1 << 30  # bytes of one message
_PANIC_GRACE = 3.0  # seconds for the console to say what QMP announced
_CONSOLE_GRACE = 2.0  # seconds for the rest of the console to be read after QEMU's end
_NOTE_TIMEOUT = 10.0  # seconds for a warning to come over the serial line
_MONITOR_TIMEOUT = 60.0  # seconds for QEMU to carry out a command
_DUMP_TIMEOUT = 600.0
_STALL_GRACE = 1.5  # seconds for a kernel that complains of a stall to answer all the same
# No sign of life: how many times as long as the first boot took, and at least how many seconds.
_SILENCE_FACTOR, _SILENCE_LEAST = 4, 10.0
_LATE = 1.0  # seconds; a timer that is later than that says more of the host than of the guest
_PULSE = 3.0  # seconds in which a living guest beats
_GLANCE = 0.2  # seconds between two looks for a sign of life
_SIGN_LIMIT = 60.0  # seconds for one to come, where silence may last longer
_SHOW_TIMEOUT = 1.5  # seconds for the first process to have the kernel show what it does
_SHOW_PAUSE = 0.3  # seconds without a line after which all is shown
_NMI_TIMEOUT = 10.0  # seconds for a kernel to say where an NMI found it
_NMI_ENDS = "---[ end Kernel panic"
_RIP = re.compile(r"CPU#(\d+).*?\b[RE]IP=([0-9a-f]+)", re.DOTALL)
_NMI = "NMI received for unknown reason"
_HANGS = frozenset({Death.SILENT, Death.SILENT_HANG, Death.HANG, Death.LANDING})
_STALLS = frozenset({Death.SOFT_LOCKUP, Death.HARD_LOCKUP, Death.RCU_STALL, Death.HUNG_TASK})
_RUNNING = frozenset({"running", "guest-panicked"})
_RESET = "guest-reset"  # qapi/run-state.json, ShutdownCause; -no-reboot makes an end of it
_BROKEN = frozenset({"internal-error", "io-error"})


@dataclass(frozen=True, slots=True)
class Life:
    """One kernel's time in a guest, from its boot to the jump.

    Attributes:
        number: 1 for the cold boot; each jump begins another.
        kernel: the name of the kernel, as the harness was given it.
        boot_id: the kernel's own name for this boot.
        release: the kernel's release, as `uname -r` gives it.
        updates: the number of live updates that the kernel counts; None if its log does not say.
        blackout: seconds until its worker was up, from the call of reboot() that led to it, or,
            for a jump that the harness did not ask for, from the last kernel's own word that it
            gives way; None for the cold boot, and if there was no such word.
    """

    number: int
    kernel: str
    boot_id: str
    release: str
    updates: int | None
    blackout: float | None


class Guest:
    """QEMU with the kernel in it. Everything here runs in one event loop.

    Attributes:
        console: what the kernel said.
        qmp: the connection to QEMU's monitor.
        life: the current one, once the guest has spoken.
        expected: what its kernel may complain of.
        silence: seconds without a sign of life after which it counts as hung; infinite until it has
            spoken for the first time, since that measures how fast the machine is.
    """

    def __init__(
        self,
        machine: Machine,
        kernel: Kernel,
        expected: frozenset[Death],
        silence: float | None = None,
        vmcores: Path | None = None,
    ) -> None:
        self.process = QemuProcess(machine)
        self.console = Console(self._kernel_began, self._complained, self._perished)
        self.qmp = QMPClient("pyluo")
        self.life: Life | None = None
        self._news: Callable[[], None] | None = None
        self._kernels = [kernel]  # of each life
        self._number = 1
        self._next: Kernel | None = None  # the kernel that is being jumped into
        self._next_began = False
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[wire.Frame]] = {}
        self._started = time.monotonic()
        self._events: list[timeline.Event] = []
        self._turn = asyncio.Lock()
        loop = asyncio.get_running_loop()
        self._death: asyncio.Future[GuestCrash | HarnessError] = loop.create_future()
        self._death.add_done_callback(lambda _: self._tell_news())
        self._hello: asyncio.Future[wire.Frame] = loop.create_future()
        self._shutdown: asyncio.Future[str] = loop.create_future()  # the cause, in QEMU's words
        self._tasks: list[asyncio.Task[None]] = []
        self._control: asyncio.StreamWriter | None = None
        self._heart: asyncio.StreamWriter | None = None
        self._console: asyncio.ReadTransport | None = None
        self._beat = time.monotonic()
        self._excused = self._beat  # silence before is not the guest's
        self._shown: asyncio.Future[None] = loop.create_future()
        self._awaited: set[asyncio.Future[Any]] = set()
        self._dying = False
        self._told = False
        self._asked_at = self._checked = 0  # numbers of reports
        self.expected = expected
        self.silence = float("inf")
        self._silence = silence
        self._vmcores = vmcores

    async def start(self, timeout: float) -> None:
        """Waits until the worker in the guest speaks.

        Args:
            timeout: in seconds; a guest that has not spoken by then counts as dead.

        Raises:
            HarnessError: QEMU did not start.
            GuestCrash: the guest died first, or never spoke.
        """
        console = asyncio.StreamReader()
        self._console, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(console), self.process.console
        )
        control, self._control = await _connect(self.process.sockets["control"])
        heart, self._heart = await _connect(self.process.sockets["heart"])
        await self.process.started()
        reading = self._spawn(self.console.read(console))
        self._spawn(self._listen(control))
        self._spawn(self._feel(heart))
        self._spawn(self._watch_process(reading))
        try:
            connected = asyncio.ensure_future(self.qmp.connect(self.process.sockets["qmp"]))
            await self._until(connected, timeout, Death.QEMU, "its monitor did not answer")
        except QMPError as error:
            raise await self._explain_failed_start() from error
        self._spawn(self._watch_panic())
        self._spawn(self._watch_pauses())
        self._spawn(self._watch_shutdown())
        await self._next_life(timeout)
        boot = time.monotonic() - self._started
        self.silence = self._silence or max(_SILENCE_LEAST, _SILENCE_FACTOR * boot)
        self._spawn(self._watch_for_silence())

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
        self, image: str, cmdline: str, kernel: Kernel, timeout: float
    ) -> wire.Frame | None:
        """Live-updates the guest.

        Returns:
            The worker's answer if the guest could not jump, and runs on; None if it did.

        Raises:
            GuestCrash: the guest died on the way, or the next kernel did not speak in time.
        """
        async with self._turn:
            if self._dying:
                raise await self._end()
            self._started = time.monotonic()
            self._events = []
            self.console.left = None
            before = self._hello
            self._hello = asyncio.get_running_loop().create_future()
            self._next, self._next_began = kernel, False
            landed = False
            try:
                answer = await self._send({"do": "jump", "image": image, "cmdline": cmdline})
                first = asyncio.ensure_future(_first(answer, self._hello))
                await self._until(first, timeout, Death.LANDING, "no word from the next kernel")
                landed = self._hello.done()
                if not landed:
                    return answer.result()
                self._number += 1
                self._kernels.append(kernel)
                await self._next_life(timeout)
                return None
            finally:
                self._next = None
                # Refused, or given up on: a kernel that comes after all comes unasked.
                if not landed:
                    self._hello = before

    async def tell(self, news: Callable[[], None] | None) -> None:
        """Calls this when the guest has died, and when a life has begun that nobody asked for."""
        self._news = news

    async def monitor(self, command: str, arguments: dict[str, object]) -> object:
        """Runs a command of QEMU's monitor.

        Raises:
            qemu.qmp.ExecuteError: QEMU refused it.
            GuestCrash: QEMU is gone, or does not answer.
        """
        if self._dying:
            raise await self._end()
        done = asyncio.ensure_future(self.qmp.execute(command, arguments or None))
        return await self._until(done, _MONITOR_TIMEOUT, Death.QEMU, f"{command} got no answer")

    async def dump(self, path: str, timeout: float = _DUMP_TIMEOUT) -> None:
        """Writes the guest's memory to a file, as an ELF core; of a dead guest as well.

        Raises:
            HarnessError: QEMU is gone, or could not.
        """
        arguments: dict[str, object] = {"paging": False, "protocol": f"file:{path}"}
        try:
            await asyncio.wait_for(self.qmp.execute("dump-guest-memory", arguments), timeout)
        except (QMPError, TimeoutError) as error:
            raise HarnessError(
                f"the guest's memory was not written to {path}: {error!r}"
            ) from error

    async def hears(self, words: str, since: int) -> bool:
        """Waits for a line that the guest has written to its kernel's log; whether it came."""
        return await self.console.said(words, since, _NOTE_TIMEOUT)

    def overlook(self) -> None:
        """Lets what the kernel complained of so far pass, when there is a worse failure to tell."""
        self._checked = len(self.console.reports)

    async def check(self, expected: frozenset[Death]) -> None:
        """Looks for what the kernel complained of since the last look.

        Args:
            expected: what it may have, beside what it may all the time.

        Raises:
            GuestCrash: it complained of something unexpected, or died of that and nobody was told.
            HarnessError: likewise, the watch over it has failed.
        """
        expected |= self.expected
        if self._dying:
            told, end = self._told, await self._end()
            died_of = {end.death} if isinstance(end, GuestCrash) else set()
            if not told and not died_of & expected:
                raise end
            expected |= died_of
        since, self._checked = self._checked, len(self.console.reports)
        # What it said in the request that it died of was told with that.
        for report in self.console.reports[since : self._asked_at if self._dying else None]:
            if report.death not in expected:
                await self.console.settled(_SHOW_PAUSE, _SHOW_TIMEOUT)
                kernel = self._kernels[min(report.life, len(self._kernels)) - 1]
                raise await self._crash(
                    report.death, report.reason, report.life, kernel, report.lines
                )

    @property
    def kernel(self) -> Kernel:
        """That of the current life, as far as the harness knows."""
        return self._kernels[-1]

    @property
    def dead(self) -> bool:
        """Whether the guest, or the watch over it, has failed."""
        return self._dying or self._death.done()

    @property
    def timeline(self) -> timeline.Timeline:
        """What happened since the guest was started, or last asked to jump."""
        return timeline.Timeline(self._started, tuple(self._events))

    async def close(self) -> None:
        """Ends QEMU, whatever state it is in."""
        self._dying = True
        if not self._death.done():
            self._death.set_result(HarnessError("the guest was closed"))
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            with suppress(Exception):  # whatever its tasks ended in, QEMU is to end now
                await self.qmp.disconnect()
            if self._console is not None:
                self._console.close()
            for writer in (self._heart, self._control):
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
            self._fail(failure)

    def _fail(self, failure: HarnessError) -> None:
        self._dying = True
        if not self._death.done():
            self._death.set_result(failure)

    async def _send(self, message: wire.Frame) -> asyncio.Future[wire.Frame]:
        """Writes a request to the current life; the future gets the answer."""
        if self._dying:
            raise await self._end()
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
        blackout = None
        with suppress(KeyError):  # the cold boot, or somebody else's jump came first
            blackout = self.timeline.blackout
        self.life = self._life(hello, blackout)

    async def _until(
        self, awaited: asyncio.Future[T], timeout: float, death: Death, what: str
    ) -> T:
        """Waits for one of: the result, the death of the guest, the end of patience."""
        self._asked_at = len(self.console.reports)
        either: list[asyncio.Future[Any]] = [awaited, self._death]
        self._awaited.add(awaited)
        try:
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            awaited.cancel()
            raise
        finally:
            self._awaited.discard(awaited)
        if awaited.done():
            return awaited.result()
        awaited.cancel()
        if death is Death.HANG:
            await self._sign_of_life()
        self._died(death, f"{what} within {timeout:g} s")
        raise await self._end()

    async def _sign_of_life(self) -> None:
        """Waits for the next one, or until the guest counts as hung for want of any: it may have
        fallen silent just before patience with its answer ended. Of one that was stopped on
        purpose, none will come."""
        begun = time.monotonic()
        until = begun + min(self.silence + _LATE, _SIGN_LIMIT)
        if await self._status() in _RUNNING:
            while not self._dying and self._last_sign() < begun and time.monotonic() < until:
                await asyncio.sleep(_GLANCE)

    async def _end(self) -> GuestCrash | HarnessError:
        """Waits until it is known what the guest died of, for somebody who is told."""
        end = await asyncio.shield(self._death)
        self._told = True
        return end

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        with suppress(ConnectionResetError):  # QEMU's death, which is an end as well
            while line := await stream.readline():
                if message := wire.parse(line):
                    self._take(message)

    async def _feel(self, stream: asyncio.StreamReader) -> None:
        """Listens to the first process's beats."""
        with suppress(ConnectionResetError):
            while line := await stream.readline():
                self._beat = time.monotonic()
                if line.strip() == b"shown" and not self._shown.done():
                    self._shown.set_result(None)

    def _take(self, message: wire.Frame) -> None:
        if mark := message.get("mark"):
            self._events.append(timeline.Event(mark, time.monotonic()))
        elif hello := message.get("hello"):
            self._events.append(timeline.Event(timeline.WORKER_UP, time.monotonic()))
            self._greeted(hello)
        else:
            answer = self._answers.pop(message.get("answer", 0), None)
            if answer and not answer.done():  # who asked may have given up on it
                answer.set_result(message)

    def _greeted(self, hello: wire.Frame) -> None:
        if not self._hello.done():
            self._hello.set_result(hello)
            return
        # Nobody asked for this jump; who waits for an answer of the last life waits in vain.
        self._number += 1
        same = hello["release"] == self.kernel.release
        self._kernels.append(self.kernel if same else _unknown(self.kernel, hello["release"]))
        left = self.console.left
        self.life = self._life(hello, time.monotonic() - left if left else None)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(
                    HarnessError("the guest booted again on its own", "jump by vm.live_update()")
                )
        self._tell_news()

    def _tell_news(self) -> None:
        if self._news:
            self._news()

    def _life(self, hello: wire.Frame, blackout: float | None) -> Life:
        self.console.left = None
        return Life(
            self._number,
            self.kernel.name,
            hello["boot_id"],
            hello["release"],
            hello["updates"],
            blackout,
        )

    async def _watch_process(self, reading: asyncio.Task[None]) -> None:
        status = await self.process.ended()
        # What the kernel said last explains more than that QEMU is gone.
        await asyncio.wait([reading], timeout=_CONSOLE_GRACE)
        if self.life is None and status > 0:
            error = await self._explain_failed_start()
            if not self._dying:
                self._fail(error)
        elif status < 0:
            self._died(Death.QEMU, f"killed by {signal.Signals(-status).name}{self._last_words()}")
        else:
            await asyncio.wait([self._shutdown], timeout=_CONSOLE_GRACE)
            if self._shutdown.done() and self._shutdown.result() == _RESET:
                death = Death.LANDING if self._left() else Death.RESET
                self._died(death, "the guest reset its machine, as a triple fault does")
            else:
                self._died(Death.QEMU, f"exit status {status}{self._last_words()}")

    def _last_words(self) -> str:
        """QEMU's, if there were any."""
        said = self.process.messages_log.read_text(errors="replace").splitlines()
        return f"; it said: {said[-1]}" if said else ""

    async def _watch_panic(self) -> None:
        with self.qmp.listener("GUEST_PANICKED") as listener:
            event: Message = await listener.get()
            # The console explains it better, unless it stays silent.
            await asyncio.sleep(_PANIC_GRACE)
            self._died(Death.PANIC, f"QEMU reports {event['data']}")

    async def _watch_pauses(self) -> None:
        """While QEMU has it stopped, as it does to dump its memory, silence is not the guest's."""
        with self.qmp.listener(("STOP", "RESUME")) as listener:
            async for _ in listener:
                self._excused = time.monotonic()

    async def _watch_shutdown(self) -> None:
        with self.qmp.listener("SHUTDOWN") as listener:
            event: Message = await listener.get()
            data = event["data"]
            assert isinstance(data, dict)
            self._shutdown.set_result(data["reason"])

    async def _explain_failed_start(self) -> HarnessError:
        said = self.process.messages_log.read_text(errors="replace").strip()
        return HarnessError("QEMU did not start", said or "it gave no reason")

    async def _watch_for_silence(self) -> None:
        while True:
            quiet = time.monotonic() - max(self._last_sign(), self._excused)
            if quiet < self.silence:
                await self._sleep(self.silence - quiet)
                continue
            asked = time.monotonic()
            status = await self._status()
            if status in _BROKEN:
                self._died(Death.QEMU, f"QEMU stopped the guest: {status}")
                return
            if status not in _RUNNING:
                self._excused = time.monotonic()  # who stopped it on purpose may let it go on
            elif max(self._last_sign(), self._excused) < asked:
                self._died(Death.SILENT_HANG, f"nothing for {quiet:.1f} s")
                return

    def _last_sign(self) -> float:
        """When there was the last sign of life, in seconds on the monotonic clock."""
        return max(self._beat, self.console.heard)

    async def _sleep(self, seconds: float) -> None:
        """Sleeps; a host that was itself not scheduled in time cannot tell what the guest did."""
        due = time.monotonic() + seconds
        await asyncio.sleep(seconds)
        if time.monotonic() > due + _LATE:
            self._excused = time.monotonic()

    async def _status(self) -> str:
        """The guest's state, as QEMU sees it; empty if QEMU does not say."""
        try:
            answer = await asyncio.wait_for(self.qmp.execute("query-status"), _MONITOR_TIMEOUT)
        except (QMPError, TimeoutError):
            return ""
        assert isinstance(answer, dict)
        return str(answer["status"])

    def _kernel_began(self, at: float) -> None:
        self._next_began = True
        self._events.append(timeline.Event(timeline.NEW_KERNEL, at))

    def _complained(self, report: Report) -> None:
        """Who waits for something while the kernel complains of a stall waits no longer."""
        report.life, report.kernel = self._place()
        if report.severity is Severity.STALL and report.death not in self.expected:
            loop = asyncio.get_running_loop()
            loop.call_later(_STALL_GRACE, self._lose_patience, report, set(self._awaited))

    def _lose_patience(self, report: Report, awaited: set[asyncio.Future[Any]]) -> None:
        if any(not future.done() for future in awaited):
            self._died(report.death, report.reason, report)

    def _perished(self, report: Report) -> None:
        self._died(report.death, report.reason, report)

    def _place(self) -> tuple[int, str]:
        """The life that is on, and its kernel; in a jump the old one's is until the next began."""
        if self._next and self._next_began:
            return self._number + 1, self._next.name
        return self._number, self.kernel.name

    def _died(self, death: Death, reason: str, report: Report | None = None) -> None:
        """Decides what the guest died of; the first word counts."""
        if self._dying or self._death.done():
            return
        self._dying = True
        if self._left() and death in _HANGS:
            death = Death.LANDING
        elif death is Death.LANDING:
            death = Death.HANG  # it did not even leave
        life, kernel = self._number, self.kernel
        if self._next and self._left():
            life, kernel = life + 1, self._next
        self._spawn(self._tell(death, reason, life, kernel, report))

    def _left(self) -> bool:
        """Whether the guest is in a jump, and has left the kernel before it, which may yet hang or
        die when it was called to reboot."""
        gave_way = self._next_began or self.console.left is not None
        return self._next is not None and gave_way

    async def _tell(
        self, death: Death, reason: str, life: int, kernel: Kernel, report: Report | None
    ) -> None:
        lines = list(report.lines) if report else []
        vmcore, problem = await self._dump(life)
        console = self.console.tail()  # what it says from now on, it is made to say
        over = self._shutdown.done() or (report and report.severity is Severity.FATAL)
        if death in _HANGS | _STALLS and not over:
            lines += await self._backtrace()
        if death in _HANGS and (stall := self._stall(life, self._asked_at)):
            death, reason, lines = stall.death, stall.reason, [*stall.lines, *lines]
        elif death in _HANGS and (stall := self._stall(life, 0)):
            reason += f"; before that the kernel said: {stall.reason}"
        crash = await self._crash(death, reason, life, kernel, lines)
        crash.console, crash.vmcore = console, vmcore
        if problem:
            crash.add_note(problem)
        if not self._death.done():
            self._death.set_result(crash)

    async def _dump(self, life: int) -> tuple[Path | None, str]:
        """The file of a dump, if one is wanted; or why there is none."""
        if self._vmcores is None:
            return None, ""
        path = self._vmcores / f"{self.process.pid}-{life}.vmcore"
        try:
            await self.dump(os.fspath(path))
        except HarnessError as error:
            return None, str(error)
        return path, ""

    def _stall(self, life: int, since: int) -> Report | None:
        """What the kernel of a life said that explains a hang."""
        for report in self.console.reports[since:]:
            if report.severity is Severity.STALL and report.life == life:
                return report
        return None

    async def _crash(
        self, death: Death, reason: str, life: int, kernel: Kernel, lines: list[str]
    ) -> GuestCrash:
        return GuestCrash(
            death,
            reason,
            kernel=kernel.name,
            life=life,
            console=self.console.tail(),
            trace=await asyncio.to_thread(trace, lines, kernel),
            booted=self.life is not None,
        )

    async def _backtrace(self) -> list[str]:
        """What all CPUs are at: from the kernel if it lives, else by an NMI, which ends it."""
        before = self.console.length
        if time.monotonic() - self._beat < _PULSE and self._heart is not None:
            self._heart.write(b"show\n")
            await asyncio.wait([self._shown], timeout=_SHOW_TIMEOUT)
        if self._shown.done():
            await self.console.settled(_SHOW_PAUSE, _SHOW_TIMEOUT)
            # Nothing comes if the thread that writes the console is on a CPU that is stuck.
            if shown := self.console.since(before):
                return shown
        registers = await self._registers()  # where nobody takes the NMI, it resets the machine
        with suppress(QMPError, TimeoutError):
            await asyncio.wait_for(self.qmp.execute("inject-nmi"), _NMI_TIMEOUT)
            await self.console.said(_NMI_ENDS, before, _NMI_TIMEOUT)
        lines = self.console.since(before)
        # A panic first prints what a kernel that hung kept to itself: reports of its own, each
        # with its lines.
        begun = [number for number, line in enumerate(lines) if _NMI in line]
        return lines[begun[0] :] if begun else lines or registers

    async def _registers(self) -> list[str]:
        """Where QEMU sees the CPUs; in addresses, since KASLR has put the kernel anywhere."""
        command: dict[str, object] = {"command-line": "info registers -a"}
        try:
            answer = await asyncio.wait_for(
                self.qmp.execute("human-monitor-command", command), _NMI_TIMEOUT
            )
        except (QMPError, TimeoutError):
            return []
        return [f"CPU: {cpu} at {address}" for cpu, address in _RIP.findall(str(answer))]


def _unknown(before: Kernel, release: str) -> Kernel:
    """A kernel that somebody in the guest chose, of which only its release is known."""
    known = replace(before, name=release, release=release, source=None)
    return replace(known, config=None, system_map=None, vmlinux=None, headers=None)


async def _connect(
    channel: socket.socket,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=channel, limit=_LINE_LIMIT)


async def _first(*futures: asyncio.Future[wire.Frame]) -> wire.Frame:
    done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()
