"""The number of guests that this machine can run at the same time."""

from __future__ import annotations

import os

from pyluo.guards import room_in_cgroups

__all__ = ["at_once", "room_for"]

_OVERHEAD = 1 << 29  # bytes for QEMU itself and the Python that drives it


def at_once(memory: int, cpus: int = 1) -> int:
    """Return how many guests this machine can run, each on cores of its own; at least one.

    Args:
        memory: the memory of a guest in bytes.
        cpus: the number of a guest's CPUs.
    """
    return max(1, min(len(os.sched_getaffinity(0)) // cpus, room_for(memory)))


def room_for(memory: int) -> int:
    """Return how many guests of this much memory fit into the machine and into the cgroup."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room, _ = room_in_cgroups()
    return int(min(total, room) // (memory + _OVERHEAD))
