"""What the bench measures as a ratio: each key once, in the order in which it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import boots, builds, dma, handoffs, imports, sessions, side_by_side, stores, vms

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.ratios import Pairs

__all__ = ["KEYS", "Key"]


@dataclass(frozen=True, slots=True)
class Key:
    """A ratio that the bench measures.

    Attributes:
        above: what is divided.
        below: what it is divided by.
        goal: the ratio to reach.
        pairs: measures a number of pairs, in turns, with the guests' kernel of a name.
        builds: whether it builds kernels, which takes hours.
    """

    above: str
    below: str
    goal: float
    pairs: Callable[[str, int], Pairs]
    builds: bool = False


KEYS = {
    "cycle_ratio": Key(
        "cold boot, preserve 16 MiB, live update, retrieve, verify, power off: VM and worker",
        "the same steps of a first process in C", 1.3, boots.cycle_ratio,
    ),
    "blackout_ratio": Key(
        "reboot() to the first byte read of the retrieved file: VM and worker",
        "the same of a first process in C", 1.25, boots.blackout_ratio,
    ),
    "lean_blackout_ratio": Key(
        "reboot() to the first byte read: a first process in C on this kernel",
        "the same on the leanest kernel that can do a live update", 1.2, boots.lean_blackout_ratio,
    ),
    "preserve_ratio": Key(
        "preserve_many of 5,000 memfds of 4 KiB", "the same ioctls from C", 1.05,
        sessions.preserve_ratio,
    ),
    "preserve_each_ratio": Key(
        "preserve of 5,000 memfds of 4 KiB, one by one", "the same ioctls from C", 1.3,
        sessions.preserve_each_ratio,
    ),
    "retrieve_ratio": Key(
        "retrieve of 5,000 memfds of 4 KiB, one by one", "the same ioctls from C", 1.3,
        sessions.retrieve_ratio,
    ),
    "store_ratio": Key(
        "a store of 10,000 named entries: add, renew, retrieve",
        "the same files in a bare session from C", 1.5, stores.store_ratio,
    ),
    "import_ratio": Key(
        'python -c "import pyluo" in the guest', "python -c pass", 1.5, imports.import_ratio
    ),
    "dma_map_ratio": Key(
        "5,000 map-file of 2 MiB for a device's DMA, and 5,000 unmap", "the same ioctls from C",
        1.15, dma.dma_map_ratio,
    ),
    "build_ratio": Key(
        "kernel tree to first verdict, nothing built before: pyluo vm bisect",
        "the kernel's own selftests/liveupdate/vmtest.sh on the same tree", 1.1,
        builds.build_ratio, builds=True,
    ),
    "warm_ratio": Key(
        "the same again, everything built before", "vmtest.sh run again", 0.4,
        builds.warm_ratio, builds=True,
    ),
    "tree_ratio": Key(
        "a line changed in a tree to its verdict: pyluo vm bisect",
        "make, and a boot and a live update of our own", 1.2, builds.tree_ratio, builds=True,
    ),
    "parallel_ratio": Key(
        "tests in two guests at once", "the same tests in one after the other", 0.52,
        side_by_side.parallel_ratio,
    ),
    "handoff_ratio": Key(
        "the pause of a handoff of 1,000 mappings by a socket", "the same from C", 1.3,
        handoffs.handoff_ratio,
    ),
    "vm_pause_ratio": Key(
        "the pause of a VM in QEMU over a live update of its host",
        "the bare blackout of the same jump", 1.2, vms.vm_pause_ratio,
    ),
}  # fmt: skip
