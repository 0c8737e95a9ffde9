"""The number of guests that this machine can run at the same time."""

from __future__ import annotations

import os

from pyluo.guards import room_in_cgroups
from pyluo.vm.cores import usable_cores

__all__ = ["at_once", "room_for"]

_OVERHEAD = 1 << 29  # bytes for QEMU itself and for the Python process that drives it


def at_once(memory: int, cpus: int = 1) -> int:
    """Return how many guests this machine can run at the same time; at least one.

    No two guests share a core, and their memory fits into the machine.

    Args:
        memory: the memory of each guest in bytes.
        cpus: the number of CPUs of each guest.
    """
    return max(1, min(usable_cores() // cpus, room_for(memory)))


def room_for(memory: int) -> int:
    """Return how many guests fit into the memory of this machine and of this process's cgroup.

    Args:
        memory: the memory of each guest in bytes.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room, _ = room_in_cgroups()
    return int(min(total, room) // (memory + _OVERHEAD))
