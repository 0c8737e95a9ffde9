"""The two ways for a run to end that are not the test's own verdict."""

from __future__ import annotations

import enum

__all__ = ["Death", "GuestCrash", "HarnessError"]


class Death(enum.Enum):
    """What a guest died of."""

    PANIC = "kernel panic"
    OOPS = "kernel oops"
    SILENT = "never spoke"
    HANG = "stopped answering"
    QEMU = "QEMU ended"


class GuestCrash(Exception):
    """The guest died, or is as good as dead; this is no verdict on what was tested.

    Attributes:
        death: what it died of.
        reason: the same in a line, in the kernel's own words where it had any.
        kernel: the name of the kernel that ran.
        life: which life of the guest it was; 1 is the cold boot, each jump begins another.
        console: the last lines of the console.
    """

    def __init__(
        self, death: Death, reason: str, *, kernel: str, life: int, console: tuple[str, ...]
    ) -> None:
        super().__init__(death, reason)
        self.death = death
        self.reason = reason
        self.kernel = kernel
        self.life = life
        self.console = console

    def __str__(self) -> str:
        head = f"{self.death.value}: {self.reason} (kernel {self.kernel}, life {self.life})"
        if not self.console:
            return f"{head}\nThe console stayed empty."
        return "\n".join(
            [head, "The console's last lines:", *(f"  {line}" for line in self.console)]
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _crash, (self.death, self.reason, self.kernel, self.life, self.console)


def _crash(
    death: Death, reason: str, kernel: str, life: int, console: tuple[str, ...]
) -> GuestCrash:
    return GuestCrash(death, reason, kernel=kernel, life=life, console=console)


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
