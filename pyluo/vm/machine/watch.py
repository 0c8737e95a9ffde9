"""The watch over a guest: decides when the guest is dead, and what it died of."""

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

_PANIC_GRACE = 3.0  # seconds for the console to show a panic after QMP has reported it
_CONSOLE_GRACE = 2.0  # seconds to read the rest of the console after QEMU's end
_QMP_TIMEOUT = 60.0  # seconds for QEMU to answer
_STALL_GRACE = 1.5  # seconds for a guest whose kernel reports a stall to answer a request
_POLL_INTERVAL = 0.2  # seconds between two checks for a sign of life
_SIGN_LIMIT = 60.0  # seconds to wait for a sign of life, at most, even if `silence` is longer
_RUNNING = frozenset({"running", "guest-panicked"})
_ENDING = "ending"  # QEMU has closed its monitor; `_watch_process` tells why
_BROKEN = frozenset({"internal-error", "io-error"})
# qapi/run-state.json, ShutdownCause; because of -no-reboot, a reset of the machine ends QEMU.
_RESET = "guest-reset"


class Watch:
    """Watches QEMU, the console and the signs of life of a guest.

    Args:
        process: the guest's QEMU.
        console: the guest's console.
        qmp: the connection to QEMU's monitor.
        vitals: the guest's signs of life.
        lives: the guest's lives.
        postmortem: finds out what the guest died of.

    Attributes:
        dying: whether the guest has died or the harness has failed; the reason may not be known
            yet.
        death: the GuestCrash, or the HarnessError if the harness failed, when it is known.
        expected: the complaints and deaths that do not count as failures.
        silence: seconds without a sign of life after which the guest counts as hung; infinite until
            the guest has spoken for the first time, because its boot shows how fast the host is.
        death_raised: whether the death was raised to a caller that used the guest.
        reports_before_request: the number of reports that came before the last request.
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
        self._shutdown: asyncio.Future[str] = loop.create_future()  # QEMU's ShutdownCause
        self._awaited: set[asyncio.Future[Any]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.dying: bool = False
        self.death: asyncio.Future[GuestCrash | HarnessError] = loop.create_future()
        self.expected: frozenset[Cause] = frozenset()
        self.silence: float = float("inf")
        self.death_raised: bool = False
        self.reports_before_request: int = 0

    @property
    def dead(self) -> bool:
        """Whether the guest has died or the harness has failed."""
        return self.dying or self.death.done()

    def watch_process(self, reading: asyncio.Task[None]) -> None:
        """Begin to watch for the end of QEMU.

        Args:
            reading: the task that reads the console.
        """
        self.spawn(self._watch_process(reading))

    def watch_monitor(self) -> None:
        """Begin to watch for events of QEMU's monitor."""
        self.spawn(self._watch_panic())
        self.spawn(self._watch_pauses())
        self.spawn(self._watch_shutdown())

    def watch_for_silence(self, silence: float) -> None:
        """Begin to watch for silence.

        Args:
            silence: seconds without a sign of life after which the guest counts as hung.
        """
        self.silence = silence
        self.spawn(self._watch_for_silence())

    def spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task until it ends or the guest is closed.

        If the coroutine raises an exception, the watch ends with a HarnessError.
        """
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._check_task)
        self._tasks.append(task)
        return task

    async def wait_for(
        self, awaited: asyncio.Future[T], timeout: float, death: Death, what: str
    ) -> T:
        """Wait for a future, and return its result, unless the guest dies first.

        Args:
            awaited: the future.
            timeout: seconds after which the guest counts as dead if the future is not done.
            death: the death that the guest counts as having died then.
            what: what the guest has not done then, for the reason of the death.

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
        if death is Death.HANG and not await self._wait_for_sign_of_life():
            death, what = Death.QEMU, f"{self._explain_no_answer()}, and {what}"
        self.declare_dead(death, f"{what} within {timeout:g} s")
        raise await self.cause_of_death()

    async def cause_of_death(self) -> GuestCrash | HarnessError:
        """Wait until it is known what the guest died of, and return the error for it.

        The caller must raise the error.
        """
        end = await asyncio.shield(self.death)
        self.death_raised = True
        return end

    def declare_dead(self, cause: Cause, reason: str, report: Report | None = None) -> None:
        """Declare the guest dead, and begin to examine it; only the first declaration counts.

        Args:
            cause: what the guest died of.
            reason: the cause in one line.
            report: the kernel's report of the cause; None if it printed none.
        """
        if self.dead:
            return
        self.dying = True
        if cause in HANGS and self._process.is_stopped:
            cause, reason = Death.QEMU, f"{self._explain_no_answer()}; {reason}"
        if self._lives.has_left and cause in HANGS:
            cause = Death.LANDING
        elif cause is Death.LANDING:
            cause = Death.HANG  # the old kernel has not even started the new one
        life, kernel = self._lives.blamed_life
        self.spawn(self._examine(cause, reason, life, kernel, report))

    def _fail(self, failure: HarnessError) -> None:
        """End the watch because of a failure of the harness."""
        self.dying = True
        if not self.death.done():
            self.death.set_result(failure)

    def take_report(self, report: Report) -> None:
        """Add the life and the kernel to a report, when its first line has come.

        If it reports a stall, the guest has only a short time left to answer pending requests.
        """
        report.life, report.kernel = self._lives.printing_life
        if report.severity is Severity.STALL and report.complaint not in self.expected:
            loop = asyncio.get_running_loop()
            loop.call_later(_STALL_GRACE, self._end_wait, report, set(self._awaited))

    def take_fatal_report(self, report: Report) -> None:
        """Declare the guest dead because of a fatal report whose trace is complete."""
        self.declare_dead(report.complaint, report.reason, report)

    def explain_failed_start(self) -> HarnessError:
        """Return the error that says why QEMU did not start, in QEMU's own words."""
        messages = self._process.messages_log.read_text(errors="replace").strip()
        return HarnessError("QEMU did not start", messages or "it gave no reason")

    async def close(self) -> None:
        """End the watch."""
        self._fail(HarnessError("the guest was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_task(self, task: asyncio.Task[None]) -> None:
        """Fail if a task of the watch failed, because nobody would notice a guest's death then."""
        if not task.cancelled() and (error := task.exception()) and not self.death.done():
            failure = HarnessError(f"the harness failed to watch the guest: {error!r}")
            failure.__cause__ = error
            self._fail(failure)

    async def _examine(
        self, cause: Cause, reason: str, life: int, kernel: Kernel, report: Report | None
    ) -> None:
        booted = self._lives.current is not None
        try:
            crash = await self._postmortem.examine(
                cause,
                reason,
                life,
                kernel,
                report=report,
                has_halted=self._shutdown.done,
                since_request=self.reports_before_request,
                booted=booted,
            )
        except Exception as error:  # the guest is dead all the same
            console = self._console.tail()
            crash = GuestCrash(
                cause, reason, kernel=kernel.name, life=life, console=console, booted=booted
            )
            crash.add_note(f"What the guest died of could not be examined further: {error!r}")
        if not self.death.done():
            self.death.set_result(crash)

    def _explain_no_answer(self) -> str:
        if self._process.is_stopped:
            return "it is stopped, by a signal or a debugger"
        return "its monitor does not answer"

    def _end_wait(self, report: Report, awaited: set[asyncio.Future[Any]]) -> None:
        if any(not future.done() for future in awaited):
            self.declare_dead(report.complaint, report.reason, report)

    async def _watch_process(self, reading: asyncio.Task[None]) -> None:
        status = await self._process.wait_for_end()
        # Read the kernel's last words first: they explain more than the fact that QEMU has ended.
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
        """Return QEMU's last message as text to append to a reason; empty if there is none."""
        messages = self._process.messages_log.read_text(errors="replace").splitlines()
        return f"; it said: {messages[-1]}" if messages else ""

    async def _watch_panic(self) -> None:
        with self._qmp.listener("GUEST_PANICKED") as listener:
            event: Message = await listener.get()
            # Wait for the console, which explains the panic better. If a fatal report comes from
            # it, the declaration here does not count.
            await asyncio.sleep(_PANIC_GRACE)
            self.declare_dead(Complaint.PANIC, f"QEMU reports {event['data']}")

    async def _watch_pauses(self) -> None:
        """Excuse silence while the guest is stopped; QEMU stops a guest to dump its memory."""
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
            if not status:
                self.declare_dead(Death.QEMU, self._explain_no_answer())
                return
            if status not in _RUNNING:
                self._vitals.excuse_silence()  # the guest is stopped, and may be resumed later
            elif max(self._vitals.last_sign, self._vitals.excused) < asked:
                self.declare_dead(Death.SILENT_HANG, f"nothing for {quiet:.1f} s")
                return

    async def _wait_for_sign_of_life(self) -> bool:
        """Wait for the next sign of life, or until the guest counts as hung.

        The guest may have died just before the time for its answer was over; a death by silence
        is then declared first. If the guest is stopped, this does not wait.

        Returns:
            Whether QEMU answers.
        """
        start = time.monotonic()
        until = start + min(self.silence + LATENESS, _SIGN_LIMIT)
        status = await self._status()
        if status in _RUNNING:
            while not self.dying and self._vitals.last_sign < start and time.monotonic() < until:
                await asyncio.sleep(_POLL_INTERVAL)
        return bool(status)

    async def _status(self) -> str:
        """Return the guest's state from QEMU's query-status; empty if QEMU does not answer."""
        if self._process.is_stopped:
            return ""
        try:
            answer = await asyncio.wait_for(self._qmp.execute("query-status"), _QMP_TIMEOUT)
        except TimeoutError:
            return ""
        except QMPError:
            return _ENDING
        assert isinstance(answer, dict)
        return str(answer["status"])
