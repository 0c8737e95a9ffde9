"""What this process has done with guests, and how many this machine takes at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.timeline import GuestLog
    from pyluo.vm.vm import VM

__all__ = ["Usage", "at_once", "usage"]

_BESIDE_A_GUEST = 1 << 29  # bytes, that QEMU and the Python which drives it need


@dataclass(slots=True)
class Usage:
    """What was done with guests.

    Attributes:
        boots: how many were started.
        requests: how many things they were asked for, jumps aside.
        live_updates: how many jumps they made.
        running: those that are there, dead or alive.
        ended: what is left of those that are gone; None unless somebody wants it kept.
    """

    boots: int = 0
    requests: int = 0
    live_updates: int = 0
    running: list[VM] = field(default_factory=list)
    ended: list[GuestLog] | None = None


usage = Usage()


def at_once(memory: int, cpus: int = 1) -> int:
    """How many guests this machine takes: each has its cores, and its memory; one at least.

    Args:
        memory: of a guest, in bytes.
        cpus: of a guest.
    """
    cores = len(os.sched_getaffinity(0))
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores // cpus, has // (memory + _BESIDE_A_GUEST)))
