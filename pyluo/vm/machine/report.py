"""Reports: the lines that a kernel prints when something is wrong, such as a warning or an oops.

Only this module knows what reports look like. The patterns follow the sources of Linux 7.2 and 7.3,
and include older forms that are still in use.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from pyluo.vm.errors import Complaint

__all__ = ["EARLY_DEATH", "STAMP", "Report", "Severity", "find_report"]

# The timestamp of a line that a kernel prints. Lines that programs print on the console have none.
STAMP = r"\[ *\d+\.\d+\](?:\[[^]]*\])? "
# What a kernel prints if it dies before its lines have timestamps: arch/x86/mm/extable.c,
# early_fixup_exception(), and arch/x86/boot/compressed/error.c.
EARLY_DEATH = r"^(PANIC: early exception .*|\s*-- System halted)"
_PREFIX = r"(?:watchdog: |rcu: |INFO: )*"
_LINE_LIMIT = 400  # lines of a report, at most


class Severity(enum.Enum):
    """What happens to a kernel that prints a report."""

    FATAL = "it dies"
    STALL = "it recovers, or hangs for ever"
    SURVIVABLE = "it goes on"


@dataclass(frozen=True, slots=True)
class _Pattern:
    pattern: re.Pattern[str]
    complaint: Complaint
    severity: Severity
    end: re.Pattern[str]


_PANIC_ENDS = re.compile(r"---\[ end Kernel panic")
_TRACE_ENDS = re.compile(r"</TASK>|---\[ end ")
_KASAN_ENDS = re.compile(r"={60}")
# The console does not show the trace of a hung task, because of the log level of the trace.
_TASK_ENDS = re.compile(r"disables this message")


def _stamped(
    pattern: str, complaint: Complaint, severity: Severity, end: re.Pattern[str] = _TRACE_ENDS
) -> _Pattern:
    return _Pattern(re.compile(STAMP + pattern), complaint, severity, end)


# The first pattern that matches a line counts. An oops is FATAL because guests run with oops=panic.
_PATTERNS = (
    _Pattern(re.compile(EARLY_DEATH), Complaint.PANIC, Severity.FATAL, _PANIC_ENDS),
    _stamped(r"Kernel panic - not syncing: (.*)", Complaint.PANIC, Severity.FATAL, _PANIC_ENDS),
    _stamped(r"(kernel BUG at .*)", Complaint.BUG, Severity.FATAL, _PANIC_ENDS),
    _stamped(
        r"((?:Oops: |BUG: unable to handle|BUG: kernel NULL|BUG: .*stack guard page"
        r"|general protection fault|double fault|divide error).*)",
        Complaint.OOPS,
        Severity.FATAL,
        _PANIC_ENDS,
    ),
    _stamped(r"(BUG: KASAN: .*)", Complaint.KASAN, Severity.SURVIVABLE, _KASAN_ENDS),
    _stamped(_PREFIX + r"(BUG: soft lockup.*)", Complaint.SOFT_LOCKUP, Severity.STALL),
    _stamped(_PREFIX + r"(.*hard LOCKUP.*)", Complaint.HARD_LOCKUP, Severity.STALL),
    _stamped(
        _PREFIX + r"(\w+ (?:detected (?:expedited )?stalls?\b|self-detected stall).*)",
        Complaint.RCU_STALL,
        Severity.STALL,
    ),
    _stamped(
        _PREFIX + r"(task .* blocked.* for more than.*)",
        Complaint.HUNG_TASK,
        Severity.STALL,
        _TASK_ENDS,
    ),
    # kernel/locking/lockdep.c
    _stamped(
        r"(?:WARNING: |\[ |INFO: )((?:possible (?:circular|recursive|irq lock)|inconsistent lock"
        r"|\S+-safe -> \S+-unsafe|bad unlock|bad contention|suspicious RCU|Nested lock|held lock"
        r"|lock held|\S+ still has locks|chain_key|BUG: Invalid wait context"
        r"|trying to register non-static key).*)",
        Complaint.LOCKDEP,
        Severity.SURVIVABLE,
    ),
    _stamped(
        r"WARNING: ((?:CPU: \d+ PID: |\S+:\d+ at |at ).*)", Complaint.WARNING, Severity.SURVIVABLE
    ),
    _stamped(r"(UBSAN: .* in .*)", Complaint.WARNING, Severity.SURVIVABLE),
    _stamped(r"(BUG: .*)", Complaint.BUG, Severity.SURVIVABLE),
)
# Reasons of panics that only follow from an earlier report, and the complaint of that report; None
# if the earlier report may be any complaint.
_CONSEQUENCES = (
    (re.compile(r"softlockup: hung tasks"), Complaint.SOFT_LOCKUP),
    (re.compile(r"Hard LOCKUP"), Complaint.HARD_LOCKUP),
    (re.compile(r"RCU Stall"), Complaint.RCU_STALL),
    (re.compile(r"hung_task: blocked tasks"), Complaint.HUNG_TASK),
    (re.compile(r"KASAN: panic_on_warn set|kasan\.fault=panic"), Complaint.KASAN),
    (re.compile(r"panic_on_warn set|system warned too often"), None),
)


@dataclass(slots=True, eq=False)
class Report:
    """A report that a kernel printed.

    Attributes:
        complaint: what the kernel complains of.
        severity: what happens to the kernel.
        reason: the complaint in one line, in the kernel's words.
        lines: the lines of the report that have come so far.
        life: the number of the guest's life in which the report was printed.
        kernel: the name of the kernel that printed the report.
        at: when the first line came, in seconds on the host's monotonic clock.
    """

    complaint: Complaint
    severity: Severity
    reason: str
    lines: list[str]
    life: int = 0
    kernel: str = ""
    at: float = 0.0
    _end: re.Pattern[str] = field(default=_TRACE_ENDS, repr=False)

    def add(self, line: str) -> bool:
        """Add a line to the report; return whether the report is complete now."""
        self.lines.append(line)
        return bool(self._end.search(line)) or len(self.lines) >= _LINE_LIMIT


def find_report(line: str, before: Report | None = None) -> Report | None:
    """Return the report whose first line this is; None if the line begins no report.

    Args:
        line: a line of the console.
        before: the last report of the same life; a panic may be its consequence.
    """
    for known in _PATTERNS:
        if match := known.pattern.search(line):
            report = Report(
                known.complaint, known.severity, match[1].strip(), [line], _end=known.end
            )
            if report.complaint is Complaint.PANIC:
                _attribute(report, before)
            return report
    return None


def _attribute(panic: Report, before: Report | None) -> None:
    """Give a panic the complaint and the lines of the report that it follows from, if any.

    Args:
        panic: the report of the panic.
        before: the last report before the panic, in the same life.
    """
    for pattern, complaint in _CONSEQUENCES:
        if pattern.search(panic.reason):
            if before and complaint in (None, before.complaint):
                panic.complaint, panic.reason = before.complaint, before.reason
                panic.lines[:0] = before.lines
            elif complaint:
                panic.complaint = complaint
            return
