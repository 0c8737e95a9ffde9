"""The examination of a dead guest: dumps its memory, and finds out what its CPUs were doing."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from qemu.qmp import QMPClient, QMPError

from pyluo.vm.errors import Complaint, Death, GuestCrash, HarnessError
from pyluo.vm.machine.report import Report, Severity
from pyluo.vm.machine.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pyluo.vm.errors import Cause
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.console import Console
    from pyluo.vm.machine.qemu import QemuProcess
    from pyluo.vm.machine.vitals import Vitals

__all__ = ["HANGS", "TRACE_LIMIT", "TRACE_PAUSE", "Postmortem", "dump_memory"]

HANGS = frozenset({Death.SILENT, Death.SILENT_HANG, Death.HANG, Death.LANDING})
_STALLS = frozenset(
    {Complaint.SOFT_LOCKUP, Complaint.HARD_LOCKUP, Complaint.RCU_STALL, Complaint.HUNG_TASK}
)
_DUMP_TIMEOUT = 600.0  # seconds
TRACE_PAUSE = 0.3
"""Seconds without a line after which the kernel's traces count as complete."""
TRACE_LIMIT = 1.5
"""Seconds for the init process to make the kernel print traces, and then for the traces to come."""
_NMI_TIMEOUT = 10.0  # seconds for a kernel to print what its CPUs did when an NMI came
_NMI_ENDS = "---[ end Kernel panic"
_NMI = "NMI received for unknown reason"
_RIP = re.compile(r"CPU#(\d+).*?\b[RE]IP=([0-9a-f]+)", re.DOTALL)


async def dump_memory(qmp: QMPClient, path: str) -> None:
    """Write a guest's memory to a file, as an ELF core; the guest may be dead.

    Args:
        qmp: the connection to QEMU's monitor.
        path: the absolute path of the file.

    Raises:
        HarnessError: QEMU has ended, or could not write the file.
    """
    arguments: dict[str, object] = {"paging": False, "protocol": f"file:{path}"}
    try:
        await asyncio.wait_for(qmp.execute("dump-guest-memory", arguments), _DUMP_TIMEOUT)
    except (QMPError, TimeoutError) as error:
        raise HarnessError(f"the guest's memory was not written to {path}: {error!r}") from error


class Postmortem:
    """Finds out what a guest died of.

    Args:
        process: the guest's QEMU.
        console: the guest's console.
        qmp: the connection to QEMU's monitor.
        vitals: the guest's signs of life.
        vmcores: the folder for dumps of the guest's memory; None for no dump.
    """

    def __init__(
        self,
        process: QemuProcess,
        console: Console,
        qmp: QMPClient,
        vitals: Vitals,
        vmcores: Path | None,
    ) -> None:
        self._process = process
        self._console = console
        self._qmp = qmp
        self._vitals = vitals
        self._vmcores = vmcores

    async def examine(
        self,
        cause: Cause,
        reason: str,
        life: int,
        kernel: Kernel,
        *,
        report: Report | None,
        has_halted: Callable[[], bool],
        since_request: int,
        booted: bool,
    ) -> GuestCrash:
        """Return the exception that describes the guest's death.

        Args:
            cause: what the guest seems to have died of.
            reason: the cause in one line.
            life: the number of the life in which the guest died.
            kernel: the kernel of that life.
            report: the kernel's report of the cause; None if it printed none.
            has_halted: returns whether the guest's CPUs have stopped for good; asked after the
                dump, which may take minutes.
            since_request: the number of reports that came before the last request to the guest.
            booted: whether the guest had ever spoken.
        """
        lines = list(report.lines) if report else []
        vmcore, problem = await self._dump(life)
        console = self._console.tail()  # before the kernel is made to print more
        halted = has_halted() or (report is not None and report.severity is Severity.FATAL)
        if cause in HANGS | _STALLS and not halted:
            lines += await self._backtraces()
        if cause in HANGS and (stall := self._stall(life, since_request)):
            cause, reason, lines = stall.complaint, stall.reason, [*stall.lines, *lines]
        elif cause in HANGS and (stall := self._stall(life, 0)):
            reason += f"; before that the kernel said: {stall.reason}"
        crash = GuestCrash(
            cause,
            reason,
            kernel=kernel.name,
            life=life,
            console=console,
            trace=await asyncio.to_thread(trace, lines, kernel),
            vmcore=vmcore,
            booted=booted,
        )
        if problem:
            crash.add_note(problem)
        return crash

    async def _dump(self, life: int) -> tuple[Path | None, str]:
        """Dump the guest's memory if a dump is wanted.

        Returns:
            The path of the dump, or None; and why the dump failed, if it did.
        """
        if self._vmcores is None:
            return None, ""
        # Not only QEMU's process id, which another guest may get later, or in another container.
        now = time.strftime("%Y%m%d-%H%M%S")
        name = f"{now}-{secrets.token_hex(4)}-life{life}.vmcore"
        path = self._vmcores / name
        try:
            await dump_memory(self._qmp, os.fspath(path))
        except HarnessError as error:
            return None, str(error)
        return path, ""

    def _stall(self, life: int, since: int) -> Report | None:
        """Return the kernel's first report of a stall in a life; None if there is none.

        Args:
            life: the number of the life.
            since: how many of the first reports to ignore.
        """
        for report in self._console.reports[since:]:
            if report.severity is Severity.STALL and report.life == life:
                return report
        return None

    async def _backtraces(self) -> list[str]:
        """Return lines that show what all CPUs do.

        If the init process is alive, it makes the kernel print backtraces. Otherwise an NMI makes
        the kernel panic, which prints them too. If that fails, QEMU shows the registers.
        """
        before = self._console.length
        if self._vitals.beats:
            self._vitals.ask_for_traces()
            await asyncio.wait([self._vitals.traces_shown], timeout=TRACE_LIMIT)
        if self._vitals.traces_shown.done():
            await self._console.wait_for_pause(TRACE_PAUSE, TRACE_LIMIT)
            # No line comes if the kernel thread that writes the console is on a CPU that is stuck.
            if shown := self._console.since(before):
                return shown
        # Read the registers before the NMI: if no kernel handles the NMI, it resets the machine.
        registers = await self._registers()
        with suppress(QMPError, TimeoutError):
            await asyncio.wait_for(self._qmp.execute("inject-nmi"), _NMI_TIMEOUT)
            await self._console.wait_for_words(_NMI_ENDS, before, _NMI_TIMEOUT)
        lines = self._console.since(before)
        # A panic first prints the messages that the hung kernel had not printed yet. They may
        # include other reports, so they are left out.
        starts = [number for number, line in enumerate(lines) if _NMI in line]
        return lines[starts[0] :] if starts else lines or registers

    async def _registers(self) -> list[str]:
        """Return the address at which each CPU is, one line per CPU; empty if QEMU does not answer.

        These are addresses and not symbols, because KASLR has moved the kernel.
        """
        command: dict[str, object] = {"command-line": "info registers -a"}
        try:
            answer = await asyncio.wait_for(
                self._qmp.execute("human-monitor-command", command), _NMI_TIMEOUT
            )
        except (QMPError, TimeoutError):
            return []
        return [f"CPU: {cpu} at {address}" for cpu, address in _RIP.findall(str(answer))]
