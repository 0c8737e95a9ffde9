"""The ways for a run to end that are not the test's own verdict."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Cause", "Complaint", "Death", "GuestCrash", "GuestFailure", "HarnessError",
    "KernelComplaint", "cause_of",
]  # fmt: skip


class Complaint(enum.Enum):
    """What a kernel complains of on its console. It may live on, or die of it."""

    PANIC = "kernel panic"
    OOPS = "kernel oops"
    BUG = "kernel BUG"
    WARNING = "kernel warning"
    KASAN = "KASAN report"
    LOCKDEP = "lockdep report"
    RCU_STALL = "RCU stall"
    SOFT_LOCKUP = "soft lockup"
    HARD_LOCKUP = "hard lockup"
    HUNG_TASK = "hung task"


class Death(enum.Enum):
    """How a guest ended that no complaint of its kernel explains."""

    SILENT = "never spoke"
    SILENT_HANG = "no sign of life"
    HANG = "stopped answering"
    LANDING = "never landed"
    RESET = "machine reset"
    QEMU = "QEMU ended"


Cause = Complaint | Death


def cause_of(text: str) -> Cause:
    """Return the complaint or the death with this value.

    Raises:
        ValueError: there is none.
    """
    try:
        return Complaint(text)
    except ValueError:
        return Death(text)


class GuestFailure(Exception):
    """A guest or its kernel failed, which is not the test's own verdict.

    Attributes:
        cause: what the kernel complained of, or how the guest ended without a word of its kernel.
        reason: the same in a line, in the kernel's own words if there are any.
        kernel: the name of the kernel that ran.
        life: the number of the guest's life; 1 is the cold boot, each jump begins another.
        console: the last lines of the console.
        trace: the calls in the kernel's own trace, with source lines if the kernel has debug
            information; empty if the kernel printed none.
        vmcore: the file that holds the guest's memory, if a dump was asked for.
        booted: whether the guest had ever spoken; if not, nothing was tested in it.
    """

    def __init__(
        self,
        cause: Cause,
        reason: str,
        *,
        kernel: str,
        life: int,
        console: tuple[str, ...],
        trace: tuple[str, ...] = (),
        vmcore: Path | None = None,
        booted: bool = True,
    ) -> None:
        super().__init__(cause, reason)
        self.cause = cause
        self.reason = reason
        self.kernel = kernel
        self.life = life
        self.console = console
        self.trace = trace
        self.vmcore = vmcore
        self.booted = booted

    def __str__(self) -> str:
        lines = [f"{self.cause.value}: {self.reason} (kernel {self.kernel}, life {self.life})"]
        if self.vmcore:
            lines.append(f"The guest's memory is in {self.vmcore}.")
        if self.trace:
            lines += ["The kernel's trace:", *(f"  {line}" for line in self.trace)]
        if self.console:
            lines += ["The console's last lines:", *(f"  {line}" for line in self.console)]
        else:
            lines.append("The console stayed empty.")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.cause, self.reason, vars(self))


class GuestCrash(GuestFailure):
    """The guest is dead, or hangs for good: it cannot be used any more."""


class KernelComplaint(GuestFailure):
    """The guest's kernel complained of something that the test does not expect, and may live on."""


def _restore(
    kind: type[GuestFailure], cause: Cause, reason: str, state: dict[str, Any]
) -> GuestFailure:
    failure = kind(cause, reason, kernel="", life=0, console=())
    vars(failure).update(state)
    return failure


class HarnessError(Exception):
    """The harness could not do its work: no QEMU, no disk, no kernel. No verdict on anything.

    Args:
        problem: what went wrong, in a sentence.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem
