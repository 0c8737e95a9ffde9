"""What this process has done with guests, and how many this machine takes at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyluo.guards import room_in_cgroups

if TYPE_CHECKING:
    from pyluo.vm.machine.timeline import GuestLog
    from pyluo.vm.machine.vm import VM

__all__ = ["Usage", "at_once", "room_for", "usage"]

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
    return max(1, min(len(os.sched_getaffinity(0)) // cpus, room_for(memory)))


def room_for(memory: int) -> int:
    """How many guests have room, of this much memory each: in the machine, and in the cgroup."""
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room, _ = room_in_cgroups()
    return int(min(has, room) // (memory + _BESIDE_A_GUEST))
