"""The errors that end a test without a verdict of the test itself."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Cause", "Complaint", "Death", "GuestCrash", "GuestFailure", "HarnessError",
    "KernelComplaint", "VmRegression", "cause_of",
]  # fmt: skip


class Complaint(enum.Enum):
    """What a kernel complains of on its console; the kernel may go on, or die of the problem."""

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
    """How a guest ended, if no complaint of its kernel explains the end."""

    SILENT = "never spoke"  # the worker did not come up
    SILENT_HANG = "no sign of life"  # no heartbeat and no output on the console
    HANG = "stopped answering"  # the worker did not answer a request
    LANDING = "never landed"  # the old kernel jumped, and the worker of the new one did not come up
    RESET = "machine reset"
    QEMU = "QEMU ended"


Cause = Complaint | Death


def cause_of(text: str) -> Cause:
    """Return the complaint or the death that has this text as its value.

    Raises:
        ValueError: no complaint and no death has it.
    """
    try:
        return Complaint(text)
    except ValueError:
        return Death(text)


class GuestFailure(Exception):
    """A guest died, or its kernel complained: a failure that is not an assertion of the test.

    Attributes:
        cause: what the kernel complained of; if it printed no complaint, how the guest ended.
        reason: the cause in one line, in the kernel's own words if it printed any.
        kernel: the name of the kernel that ran.
        life: the number of the guest's life: 1 after the cold boot, one more after each jump.
        console: the last lines of the console.
        trace: the calls in the kernel's trace, with source lines if the kernel has debug
            information; empty if the kernel printed no trace.
        vmcore: the file that contains the guest's memory; None if no dump was asked for.
        booted: whether the guest had ever spoken; if not, no test ran in the guest.
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
    """The guest is dead or hangs, and cannot be used any more."""


class KernelComplaint(GuestFailure):
    """The guest's kernel complained of something that the test does not expect.

    The guest may still be alive.
    """


def _restore(
    kind: type[GuestFailure], cause: Cause, reason: str, state: dict[str, Any]
) -> GuestFailure:
    failure = kind(cause, reason, kernel="", life=0, console=())
    vars(failure).update(state)
    return failure


class VmRegression(AssertionError):
    """The clock or the counter of a VM went back in a live update of its host, which is a guest."""


class HarnessError(Exception):
    """The harness could not do its work, so that there is no verdict on the kernel or the test.

    For example, QEMU, a kernel or space on the disk is missing.

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
