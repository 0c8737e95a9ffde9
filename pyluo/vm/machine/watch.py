"""The watch over a guest: decides when it is dead, and what ended it."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import Message, QMPClient, QMPError

from pyluo.vm.errors import Complaint, Death, GuestCrash, HarnessError
from pyluo.vm.machine.postmortem import HANGS, Postmortem
from pyluo.vm.machine.report import Severity
from pyluo.vm.machine.vitals import LATENESS

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pyluo.vm.errors import Cause
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.console import Console
    from pyluo.vm.machine.lives import Lives
    from pyluo.vm.machine.qemu import QemuProcess
    from pyluo.vm.machine.report import Report
    from pyluo.vm.machine.vitals import Vitals

__all__ = ["Watch"]

T = TypeVar("T")

_PANIC_GRACE = 3.0  # seconds for the console to show the panic that QMP announced
_CONSOLE_GRACE = 2.0  # seconds for the rest of the console to be read after QEMU's end
_QMP_TIMEOUT = 60.0  # seconds for QEMU to answer
_STALL_GRACE = 1.5  # seconds for a kernel that reports a stall to answer all the same
_POLL_INTERVAL = 0.2  # seconds between two checks for a sign of life
_SIGN_LIMIT = 60.0  # seconds to wait for a sign of life at most, even if `silence` is longer
_RUNNING = frozenset({"running", "guest-panicked"})
_BROKEN = frozenset({"internal-error", "io-error"})
_RESET = "guest-reset"  # qapi/run-state.json, ShutdownCause; -no-reboot turns it into an end


class Watch:
    """Watches QEMU, the console and the signs of life of a guest.

    Args:
        process: the guest's QEMU.
        console: its console.
        qmp: the connection to QEMU's monitor.
        vitals: its signs of life.
        lives: its lives.
        postmortem: finds out what it died of.

    Attributes:
        dying: whether the guest, or the watch over it, has failed.
        death: the crash, or the failure of the harness, once it is known.
        expected: the complaints and deaths that are expected.
        silence: seconds without a sign of life after which the guest counts as hung; infinite until
            it has spoken for the first time, because only its boot shows how fast the machine is.
        death_raised: whether somebody who used the guest was told of the death.
        reports_before_request: the number of reports before the last request to the guest.
    """

    def __init__(
        self,
        process: QemuProcess,
        console: Console,
        qmp: QMPClient,
        vitals: Vitals,
        lives: Lives,
        postmortem: Postmortem,
    ) -> None:
        self._process = process
        self._console = console
        self._qmp = qmp
        self._vitals = vitals
        self._lives = lives
        self._postmortem = postmortem
        loop = asyncio.get_running_loop()
        self._shutdown: asyncio.Future[str] = loop.create_future()  # the cause, in QEMU's words
        self._awaited: set[asyncio.Future[Any]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.dying = False
        self.death: asyncio.Future[GuestCrash | HarnessError] = loop.create_future()
        self.expected: frozenset[Cause] = frozenset()
        self.silence = float("inf")
        self.death_raised = False
        self.reports_before_request = 0

    @property
    def dead(self) -> bool:
        """Whether the guest, or the watch over it, has failed."""
        return self.dying or self.death.done()

    def watch_process(self, reading: asyncio.Task[None]) -> None:
        """Watch QEMU from now on.

        Args:
            reading: the task that reads the console.
        """
        self.spawn(self._watch_process(reading))

    def watch_monitor(self) -> None:
        """Watch for events of QEMU's monitor from now on."""
        self.spawn(self._watch_panic())
        self.spawn(self._watch_pauses())
        self.spawn(self._watch_shutdown())

    def watch_for_silence(self, silence: float) -> None:
        """Count the guest as hung from now on if there is no sign of life for so many seconds."""
        self.silence = silence
        self.spawn(self._watch_for_silence())

    def spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a coroutine until it ends or the guest is closed; its failure ends the watch."""
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._check_task)
        self._tasks.append(task)
        return task

    async def wait_for(
        self, awaited: asyncio.Future[T], timeout: float, death: Death, what: str
    ) -> T:
        """Wait for a result, for the death of the guest, or until the time is over.

        Args:
            awaited: the result.
            timeout: in seconds.
            death: what the guest counts as having died of if no result comes in time.
            what: what has not come then, for the reason.

        Raises:
            GuestCrash: the guest died, or the time is over.
            HarnessError: the watch over the guest failed.
        """
        self.reports_before_request = len(self._console.reports)
        self._awaited.add(awaited)
        try:
            either: list[asyncio.Future[Any]] = [awaited, self.death]
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
            await self._wait_for_sign_of_life()
        self.declare_dead(death, f"{what} within {timeout:g} s")
        raise await self.cause_of_death()

    async def cause_of_death(self) -> GuestCrash | HarnessError:
        """Wait until it is known what the guest died of; the caller must tell its user."""
        end = await asyncio.shield(self.death)
        self.death_raised = True
        return end

    def declare_dead(self, cause: Cause, reason: str, report: Report | None = None) -> None:
        """Decide what the guest died of; what is declared first counts."""
        if self.dead:
            return
        self.dying = True
        if self._lives.has_left and cause in HANGS:
            cause = Death.LANDING
        elif cause is Death.LANDING:
            cause = Death.HANG  # it did not even leave
        life, kernel = self._lives.blamed_life
        self.spawn(self._examine(cause, reason, life, kernel, report))

    def _fail(self, failure: HarnessError) -> None:
        """End the watch because of a failure of the harness."""
        self.dying = True
        if not self.death.done():
            self.death.set_result(failure)

    def take_report(self, report: Report) -> None:
        """Take a report; a kernel that reports a stall has only a short time left to answer."""
        report.life, report.kernel = self._lives.printing_life
        if report.severity is Severity.STALL and report.complaint not in self.expected:
            loop = asyncio.get_running_loop()
            loop.call_later(_STALL_GRACE, self._end_wait, report, set(self._awaited))

    def take_fatal_report(self, report: Report) -> None:
        """Take the report that the kernel died of, once its trace is complete."""
        self.declare_dead(report.complaint, report.reason, report)

    def explain_failed_start(self) -> HarnessError:
        """Return why QEMU did not start, in its own words."""
        messages = self._process.messages_log.read_text(errors="replace").strip()
        return HarnessError("QEMU did not start", messages or "it gave no reason")

    async def close(self) -> None:
        """End the watch."""
        self._fail(HarnessError("the guest was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_task(self, task: asyncio.Task[None]) -> None:
        """Fail if a watching task failed: the guest must not stay unwatched in silence."""
        if not task.cancelled() and (error := task.exception()) and not self.death.done():
            failure = HarnessError(f"the harness failed to watch the guest: {error!r}")
            failure.__cause__ = error
            self._fail(failure)

    async def _examine(
        self, cause: Cause, reason: str, life: int, kernel: Kernel, report: Report | None
    ) -> None:
        crash = await self._postmortem.examine(
            cause,
            reason,
            life,
            kernel,
            report=report,
            has_halted=self._shutdown.done,
            since_request=self.reports_before_request,
            booted=self._lives.current is not None,
        )
        if not self.death.done():
            self.death.set_result(crash)

    def _end_wait(self, report: Report, awaited: set[asyncio.Future[Any]]) -> None:
        if any(not future.done() for future in awaited):
            self.declare_dead(report.complaint, report.reason, report)

    async def _watch_process(self, reading: asyncio.Task[None]) -> None:
        status = await self._process.wait_for_end()
        # The kernel's last words explain more than the fact that QEMU is gone.
        await asyncio.wait([reading], timeout=_CONSOLE_GRACE)
        if self._lives.current is None and status > 0:
            if not self.dying:
                self._fail(self.explain_failed_start())
        elif status < 0:
            name = signal.Signals(-status).name
            self.declare_dead(Death.QEMU, f"killed by {name}{self._last_message()}")
        else:
            await asyncio.wait([self._shutdown], timeout=_CONSOLE_GRACE)
            if self._shutdown.done() and self._shutdown.result() == _RESET:
                death = Death.LANDING if self._lives.has_left else Death.RESET
                self.declare_dead(death, "the guest reset its machine, as a triple fault does")
            else:
                self.declare_dead(Death.QEMU, f"exit status {status}{self._last_message()}")

    def _last_message(self) -> str:
        """Return QEMU's last message, to be put after a reason; empty if there is none."""
        messages = self._process.messages_log.read_text(errors="replace").splitlines()
        return f"; it said: {messages[-1]}" if messages else ""

    async def _watch_panic(self) -> None:
        with self._qmp.listener("GUEST_PANICKED") as listener:
            event: Message = await listener.get()
            # The console explains it better, unless it stays silent.
            await asyncio.sleep(_PANIC_GRACE)
            self.declare_dead(Complaint.PANIC, f"QEMU reports {event['data']}")

    async def _watch_pauses(self) -> None:
        """Excuse silence while QEMU has stopped the guest, as it does to dump its memory."""
        with self._qmp.listener(("STOP", "RESUME")) as listener:
            async for _ in listener:
                self._vitals.excuse_silence()

    async def _watch_shutdown(self) -> None:
        with self._qmp.listener("SHUTDOWN") as listener:
            event: Message = await listener.get()
            data = event["data"]
            assert isinstance(data, dict)
            self._shutdown.set_result(data["reason"])

    async def _watch_for_silence(self) -> None:
        while True:
            quiet = time.monotonic() - max(self._vitals.last_sign, self._vitals.excused)
            if quiet < self.silence:
                await self._vitals.sleep(self.silence - quiet)
                continue
            asked = time.monotonic()
            status = await self._status()
            if status in _BROKEN:
                self.declare_dead(Death.QEMU, f"QEMU stopped the guest: {status}")
                return
            if status not in _RUNNING:
                self._vitals.excuse_silence()  # whoever stopped it may let it go on
            elif max(self._vitals.last_sign, self._vitals.excused) < asked:
                self.declare_dead(Death.SILENT_HANG, f"nothing for {quiet:.1f} s")
                return

    async def _wait_for_sign_of_life(self) -> None:
        """Wait for the next sign of life, or until the guest counts as hung.

        The guest may have fallen silent just before the time for its answer was over. This does not
        wait for a guest that was stopped on purpose.
        """
        start = time.monotonic()
        until = start + min(self.silence + LATENESS, _SIGN_LIMIT)
        if await self._status() in _RUNNING:
            while not self.dying and self._vitals.last_sign < start and time.monotonic() < until:
                await asyncio.sleep(_POLL_INTERVAL)

    async def _status(self) -> str:
        """Return the guest's state, as QEMU sees it; empty if QEMU does not say."""
        try:
            answer = await asyncio.wait_for(self._qmp.execute("query-status"), _QMP_TIMEOUT)
        except (QMPError, TimeoutError):
            return ""
        assert isinstance(answer, dict)
        return str(answer["status"])
