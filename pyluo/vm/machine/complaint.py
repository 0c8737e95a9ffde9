"""What a kernel prints of its own accord when something is wrong, and what each of it means.

The one place that knows what its complaints look like. Patterns follow the sources of Linux 7.2 and
7.3, with older forms where they are still about.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from pyluo.vm.errors import Death

__all__ = ["EARLY_DEATH", "STAMP", "Report", "Severity", "find"]

STAMP = r"\[ *\d+\.\d+\](?:\[[^]]*\])? "  # the kernel's; a program's own words are no report
# Before it can stamp its words: arch/x86/mm/extable.c, early_fixup_exception(), and
# arch/x86/boot/compressed/error.c.
EARLY_DEATH = r"^(PANIC: early exception .*|\s*-- System halted)"
_SPEAKER = r"(?:watchdog: |rcu: |INFO: )*"
_LINES = 400  # of one report


class Severity(enum.Enum):
    """What becomes of a kernel that prints it."""

    FATAL = "it ends here"
    STALL = "it may recover, or never"
    OMEN = "it goes on"


@dataclass(frozen=True, slots=True)
class _Sign:
    pattern: re.Pattern[str]
    death: Death
    severity: Severity
    end: re.Pattern[str]


_PANIC_ENDS = re.compile(r"---\[ end Kernel panic")
_TRACE_ENDS = re.compile(r"</TASK>|---\[ end ")
_KASAN_ENDS = re.compile(r"={60}")
_TASK_ENDS = re.compile(r"disables this message")  # its trace is too low a level for the console


def _sign(
    pattern: str, death: Death, severity: Severity, end: re.Pattern[str] = _TRACE_ENDS
) -> _Sign:
    return _Sign(re.compile(STAMP + pattern), death, severity, end)


# The first that fits counts. `oops=panic`, so that an oops is as final as a panic.
_SIGNS = (
    _Sign(re.compile(EARLY_DEATH), Death.PANIC, Severity.FATAL, _PANIC_ENDS),
    _sign(r"Kernel panic - not syncing: (.*)", Death.PANIC, Severity.FATAL, _PANIC_ENDS),
    _sign(r"(kernel BUG at .*)", Death.BUG, Severity.FATAL, _PANIC_ENDS),
    _sign(
        r"((?:Oops: |BUG: unable to handle|BUG: kernel NULL|BUG: .*stack guard page"
        r"|general protection fault|double fault|divide error).*)",
        Death.OOPS,
        Severity.FATAL,
        _PANIC_ENDS,
    ),
    _sign(r"(BUG: KASAN: .*)", Death.KASAN, Severity.OMEN, _KASAN_ENDS),
    _sign(_SPEAKER + r"(BUG: soft lockup.*)", Death.SOFT_LOCKUP, Severity.STALL),
    _sign(_SPEAKER + r"(.*hard LOCKUP.*)", Death.HARD_LOCKUP, Severity.STALL),
    _sign(
        _SPEAKER + r"(\w+ (?:detected (?:expedited )?stalls?\b|self-detected stall).*)",
        Death.RCU_STALL,
        Severity.STALL,
    ),
    _sign(
        _SPEAKER + r"(task .* blocked.* for more than.*)",
        Death.HUNG_TASK,
        Severity.STALL,
        _TASK_ENDS,
    ),
    # kernel/locking/lockdep.c
    _sign(
        r"(?:WARNING: |\[ |INFO: )((?:possible (?:circular|recursive|irq lock)|inconsistent lock"
        r"|\S+-safe -> \S+-unsafe|bad unlock|bad contention|suspicious RCU|Nested lock|held lock"
        r"|lock held|\S+ still has locks|chain_key|BUG: Invalid wait context"
        r"|trying to register non-static key).*)",
        Death.LOCKDEP,
        Severity.OMEN,
    ),
    _sign(r"WARNING: ((?:CPU: \d+ PID: |\S+:\d+ at |at ).*)", Death.WARNING, Severity.OMEN),
    _sign(r"(UBSAN: .* in .*)", Death.WARNING, Severity.OMEN),
    _sign(r"(BUG: .*)", Death.BUG, Severity.OMEN),
)
# Panics that only carry out what a report before them led to; None where any may have.
_CONSEQUENCES = (
    (re.compile(r"softlockup: hung tasks"), Death.SOFT_LOCKUP),
    (re.compile(r"Hard LOCKUP"), Death.HARD_LOCKUP),
    (re.compile(r"RCU Stall"), Death.RCU_STALL),
    (re.compile(r"hung_task: blocked tasks"), Death.HUNG_TASK),
    (re.compile(r"KASAN: panic_on_warn set|kasan\.fault=panic"), Death.KASAN),
    (re.compile(r"panic_on_warn set|system warned too often"), None),
)


@dataclass(slots=True, eq=False)
class Report:
    """Something a kernel complained of.

    Attributes:
        death: what it is, or would be if the guest died of it.
        severity: what becomes of the kernel.
        reason: the kernel's words in a line.
        lines: all lines of it so far.
        life: in which life of the guest; 1 is the cold boot.
        kernel: the name of the kernel that said it.
        at: seconds on the host's monotonic clock, when its first line came.
    """

    death: Death
    severity: Severity
    reason: str
    lines: list[str]
    life: int = 0
    kernel: str = ""
    at: float = 0.0
    _end: re.Pattern[str] = field(default=_TRACE_ENDS, repr=False)

    def take(self, line: str) -> bool:
        """Adds a line; whether that was the last."""
        self.lines.append(line)
        return bool(self._end.search(line)) or len(self.lines) >= _LINES


def find(line: str, before: Report | None = None) -> Report | None:
    """The report that a line begins, if it does.

    Args:
        line: as it came over the serial line.
        before: the last one of this life, which a panic may be a consequence of.
    """
    for sign in _SIGNS:
        if match := sign.pattern.search(line):
            report = Report(sign.death, sign.severity, match[1].strip(), [line], _end=sign.end)
            if report.death is Death.PANIC:
                _attribute(report, before)
            return report
    return None


def _attribute(panic: Report, before: Report | None) -> None:
    """Tells a panic that is a consequence as what it is the consequence of."""
    for pattern, death in _CONSEQUENCES:
        if pattern.search(panic.reason):
            if before and death in (None, before.death):
                panic.death, panic.reason = before.death, before.reason
                panic.lines[:0] = before.lines
            elif death:
                panic.death = death
            return
