"""The two ways for a run to end that are not the test's own verdict."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Death", "GuestCrash", "HarnessError"]


class Death(enum.Enum):
    """What a guest died of, or what its kernel complained of."""

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
    SILENT = "never spoke"
    SILENT_HANG = "no sign of life"
    HANG = "stopped answering"
    LANDING = "never landed"
    RESET = "machine reset"
    QEMU = "QEMU ended"


class GuestCrash(Exception):
    """The guest died, or is as good as dead, or its kernel complained of something unexpected; this
    is no verdict on what was tested.

    Attributes:
        death: what it died of.
        reason: the same in a line, in the kernel's own words where it had any.
        kernel: the name of the kernel that ran.
        life: which life of the guest it was; 1 is the cold boot, each jump begins another.
        console: the last lines of the console.
        trace: who called whom, in the kernel's own trace, with source lines where the kernel's
            debug information has them; empty if there is none.
        vmcore: the file that the guest's memory was written to, if that was asked for.
        booted: whether the guest had ever spoken; if not, nothing can have been tested in it.
    """

    def __init__(
        self,
        death: Death,
        reason: str,
        *,
        kernel: str,
        life: int,
        console: tuple[str, ...],
        trace: tuple[str, ...] = (),
        vmcore: Path | None = None,
        booted: bool = True,
    ) -> None:
        super().__init__(death, reason)
        self.death = death
        self.reason = reason
        self.kernel = kernel
        self.life = life
        self.console = console
        self.trace = trace
        self.vmcore = vmcore
        self.booted = booted

    def __str__(self) -> str:
        lines = [f"{self.death.value}: {self.reason} (kernel {self.kernel}, life {self.life})"]
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
        return _crash, (self.death, self.reason, vars(self))


def _crash(death: Death, reason: str, state: dict[str, Any]) -> GuestCrash:
    crash = GuestCrash(death, reason, kernel="", life=0, console=())
    vars(crash).update(state)
    return crash


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
