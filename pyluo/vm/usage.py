"""What this process has done with guests, counted for the summary of a test run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.vm import VM

__all__ = ["Usage", "usage"]


@dataclass(slots=True)
class Usage:
    """What was done with guests.

    Attributes:
        boots: how many were started.
        requests: how many things they were asked for, jumps aside.
        live_updates: how many jumps they made.
        running: those that are there, dead or alive.
    """

    boots: int = 0
    requests: int = 0
    live_updates: int = 0
    running: list[VM] = field(default_factory=list)


usage = Usage()
