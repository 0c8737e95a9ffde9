"""A store of 10,000 named entries, and the same files in a bare session from C.

Each entry is a memfd of 4 KiB with 100 bytes of metadata, which the floor does not have.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from benchmarks.floors import compile_floor, run_floor
from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair
from benchmarks.sessions import SIZE, make_files
from pyluo import IncomingStore, KeeperChoice, Memfd, OutgoingStore

if TYPE_CHECKING:
    from benchmarks.ratios import Pairs

__all__ = ["store_ratio"]

COUNT = 10_000
META = {"text": "x" * 88}  # 100 bytes as JSON


def store_ratio(kernel: str, rounds: int) -> Pairs:
    """Add the entries one by one, renew the store after a jump, and retrieve all after another."""
    floor = compile_floor("sessions")
    with patient_vm(kernel, memory=2 << 30) as vm:
        for _ in range(rounds):
            above = below = 0.0
            for operation, function in (("hold", add), ("renew", renew)):
                held = vm.hold(function, COUNT)
                above += vm.call(get_seconds, held)
                below += run_floor(vm, floor, operation, "floor", 1, COUNT, SIZE)
                vm.live_update()
            above += vm.call(retrieve)
            below += run_floor(vm, floor, "retrieve", "floor", 1, COUNT, SIZE)
            yield Pair(above, below)


# What runs in the guest:


def add(count: int) -> tuple[float, Any]:
    """Add the entries one by one."""
    files = make_files(count)
    began = time.perf_counter()
    store = OutgoingStore.create("store", keeper=KeeperChoice.NONE)
    for number, file in enumerate(files):
        store.add(str(number), file, meta=META)
    seconds = time.perf_counter() - began
    for file in files:
        file.close()
    return seconds, store


def renew(_: int) -> tuple[float, Any]:
    """Renew the store."""
    began = time.perf_counter()
    store = IncomingStore.retrieve("store", keeper=KeeperChoice.NONE).renew()
    return time.perf_counter() - began, store


def retrieve() -> float:
    """Retrieve the store and each of its files, and close each file."""
    began = time.perf_counter()
    store = IncomingStore.retrieve("store", keeper=KeeperChoice.NONE)
    for entry in store:
        store.get(entry, Memfd).close()
    seconds = time.perf_counter() - began
    store.finish(destroy=list(store))
    return seconds


def get_seconds(held: tuple[float, Any]) -> float:
    """Return the seconds that were held with a store."""
    return held[0]
