"""Stores of many named entries, and the same files in a bare session from C.

Each entry is a memfd of 4 KiB with 100 bytes of metadata, which the floor does not have.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from benchmarks.floors import compile_floor, run_floor
from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair
from benchmarks.sessions import SIZE, make_files
from pyluo import IncomingStore, KeeperChoice, Memfd, NewEntry, OutgoingStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.carried import Points
    from benchmarks.ratios import Pairs

__all__ = ["entries", "store_ratio"]

COUNT = 10_000
META = {"text": "x" * 88}  # 100 bytes as JSON


def store_ratio(kernel: str, rounds: int) -> Pairs:
    """Add the entries one by one, renew the store after a jump, and retrieve all after another."""
    floor = compile_floor("sessions")
    with patient_vm(kernel, memory=2 << 30) as vm:
        for _ in range(rounds):
            above = below = 0.0
            for operation, function in (("hold", add), ("renew", renew)):
                held = vm.hold(function, "store", COUNT)
                above += vm.call(get_seconds, held)
                below += run_floor(vm, floor, operation, "floor", 1, COUNT, SIZE)
                vm.live_update()
            above += vm.call(retrieve, "store")
            below += run_floor(vm, floor, "retrieve", "floor", 1, COUNT, SIZE)
            yield Pair(above, below)


def entries(kernel: str, sizes: Sequence[int], rounds: int) -> Points:
    """Make stores of several sizes in one guest, renew one of them, and retrieve it."""
    floor = compile_floor("sessions")
    with patient_vm(kernel, memory=2 << 30) as vm:
        for _ in range(rounds):
            for size in sizes:
                seen: dict[str, float] = {}
                for what, function in (("add", add), ("add_many", add_many)):
                    held = vm.hold(function, what, size)
                    seen[what] = vm.call(get_seconds, held)
                seen["preserve, C"] = run_floor(vm, floor, "hold", "floor", 1, size, SIZE)
                vm.live_update()
                seen["retrieve"] = vm.call(retrieve, "add_many")
                held = vm.hold(renew, "add", size)
                seen["renew"] = vm.call(get_seconds, held)
                seen["renew, C"] = run_floor(vm, floor, "renew", "floor", 1, size, SIZE)
                vm.live_update()
                seen["retrieve, C"] = run_floor(vm, floor, "retrieve", "floor", 1, size, SIZE)
                vm.call(retrieve, "add")  # so that the next size begins with nothing
                yield size, seen


# What runs in the guest:


def add(name: str, count: int) -> tuple[float, Any]:
    """Add the entries one by one."""
    files = make_files(count)
    began = time.perf_counter()
    store = OutgoingStore.create(name, keeper=KeeperChoice.NONE)
    for number, file in enumerate(files):
        store.add(str(number), file, meta=META)
    return _close(files, time.perf_counter() - began), store


def add_many(name: str, count: int) -> tuple[float, Any]:
    """Add the entries by one call."""
    files = make_files(count)
    began = time.perf_counter()
    store = OutgoingStore.create(name, keeper=KeeperChoice.NONE)
    store.add_many([NewEntry(str(each), file, meta=META) for each, file in enumerate(files)])
    return _close(files, time.perf_counter() - began), store


def _close(files: list[Memfd], seconds: float) -> float:
    """Close the files that are in a store; return the seconds."""
    for file in files:
        file.close()
    return seconds


def renew(name: str, _: int) -> tuple[float, Any]:
    """Renew the store."""
    began = time.perf_counter()
    store = IncomingStore.retrieve(name, keeper=KeeperChoice.NONE).renew()
    return time.perf_counter() - began, store


def retrieve(name: str) -> float:
    """Retrieve the store and each of its files, and close each file."""
    began = time.perf_counter()
    store = IncomingStore.retrieve(name, keeper=KeeperChoice.NONE)
    for entry in store:
        store.get(entry, Memfd).close()
    seconds = time.perf_counter() - began
    store.finish(destroy=list(store))
    return seconds


def get_seconds(held: tuple[float, Any]) -> float:
    """Return the seconds that were held with a store."""
    return held[0]
