"""Measure what a store takes for many entries, as multiples of the bare requests from C.

Each entry is a memfd of 4 KiB with 100 bytes of metadata. `add` and `add_many` preserve them;
`retrieve` retrieves the store and each file once; `renew` makes it ready for the next update. The
floor makes the same requests to the kernel and nothing else. Both run in one guest, in turns. For
each of these, an exponent is fitted to the times of several numbers of entries: 1 is linear. The
kernel looks at the tokens of a session one by one for each request, so that the floor's exponent is
above 1 for many entries. The store's own exponent is that of its time less the floor's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import curves
from pyluo import IncomingStore, KeeperChoice, Memfd, NewEntry, OutgoingStore
from pyluo.vm import VM

COUNTS = (1250, 2500, 5000, 10_000)
META = {"text": "x" * 88}  # 100 bytes as JSON
FLOOR = Path(__file__).with_name("store_floor.c")
BUILD = Path(__file__).parent.parent / "build" / "bench"
# What is measured, and the operation of the floor that it is divided by.
FLOORS = {"add": "preserve", "add_many": "preserve", "retrieve": "retrieve", "renew": "renew"}


def main() -> None:
    arguments = curves.parse(__doc__, COUNTS)
    floor = build_floor()
    with VM(arguments.kernel, memory=2 << 30, call_timeout=600) as vm:
        measured = curves.measure("stores", arguments, lambda count: run(vm, floor, count))
    if arguments.json:
        print(json.dumps(measured))
    else:
        show(measured)


def build_floor() -> str:
    """Compile the floor; return its path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = os.fspath(BUILD / FLOOR.stem)
    uapi = FLOOR.parent.parent / "pyluo" / "_uapi"
    command = ["gcc", "-O2", "-static", "-iquote", os.fspath(uapi), "-o", program, os.fspath(FLOOR)]
    subprocess.run(command, check=True)
    return program


def run(vm: VM, floor: str, count: int) -> dict[str, float]:
    """Measure everything once, over one live update."""
    seen: dict[str, float] = {}
    for what, function in (("add", add_each), ("add_many", add_at_once)):
        seen["floor: preserve"] = run_floor(vm, floor, "preserve", f"{what} floor", count)
        held = vm.hold(function, what, count)
        seen[what] = vm.call(get_seconds, held)
    vm.live_update()
    seen["floor: retrieve"] = run_floor(vm, floor, "retrieve", "add floor", count)
    seen["retrieve"] = vm.call(retrieve, "add")
    seen["floor: renew"] = run_floor(vm, floor, "renew", "add_many floor", count)
    held = vm.hold(renew, "add_many")
    seen["renew"] = vm.call(get_seconds, held)
    vm.live_update()  # so that the next round begins with nothing
    return seen


def run_floor(vm: VM, floor: str, operation: str, name: str, count: int) -> float:
    done = vm.run([floor, operation, name, str(count)])
    if done.returncode:
        sys.exit(f"{floor} {operation}: {done.stderr.decode()}")
    return float(done.stdout)


# What runs in the guest:


def make_files(count: int) -> list[Memfd]:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    files = [Memfd.create("file", 4096) for _ in range(count)]
    for file in files:
        file.write(b"x", 0)
    return files


def add_each(name: str, count: int) -> tuple[float, Any]:
    """Add the entries one by one."""
    files = make_files(count)
    store = OutgoingStore.create(name, keeper=KeeperChoice.NONE)
    began = time.perf_counter()
    for number, file in enumerate(files):
        store.add(str(number), file, meta=META)
    seconds = time.perf_counter() - began
    for file in files:
        file.close()
    return seconds, store


def add_at_once(name: str, count: int) -> tuple[float, Any]:
    """Add the entries by one call."""
    files = make_files(count)
    store = OutgoingStore.create(name, keeper=KeeperChoice.NONE)
    began = time.perf_counter()
    store.add_many([NewEntry(str(each), file, meta=META) for each, file in enumerate(files)])
    seconds = time.perf_counter() - began
    for file in files:
        file.close()
    return seconds, store


def retrieve(name: str) -> float:
    """Retrieve the store and each of its files."""
    began = time.perf_counter()
    store = IncomingStore.retrieve(name, keeper=KeeperChoice.NONE)
    for entry in store:
        store.get(entry, Memfd).close()
    seconds = time.perf_counter() - began
    store.finish(destroy=list(store))
    return seconds


def renew(name: str) -> tuple[float, Any]:
    """Renew the store."""
    began = time.perf_counter()
    store = IncomingStore.retrieve(name, keeper=KeeperChoice.NONE).renew()
    return time.perf_counter() - began, store


def get_seconds(held: tuple[float, Any]) -> float:
    return held[0]


# What is made of the times:


def show(measured: dict[str, dict[str, list[float]]]) -> None:
    """Print a table of the times for the most entries, and the exponents."""
    most = list(measured["add"])[-1]
    headings = ("median", "least", "most", "of the floor", "exponent", "own", "the floor's")
    table = Table(f"{most} entries", *headings, box=None)
    for what, floor in FLOORS.items():
        seconds, bare = measured[what][most], measured[f"floor: {floor}"][most]
        ratios = [ours / theirs for ours, theirs in zip(seconds, bare, strict=True)]
        bare_times = measured[f"floor: {floor}"]
        own = {
            count: [ours - theirs for ours, theirs in zip(times, bare_times[count], strict=True)]
            for count, times in measured[what].items()
        }
        exponents = [measured[what], own, bare_times]
        table.add_row(
            what,
            *(f"{each:.2f} s" for each in (statistics.median(seconds), min(seconds), max(seconds))),
            f"{statistics.median(ratios):.2f}",
            *(
                f"{curves.fit_exponent(times):.2f}" if len(times) > 1 else "-"
                for times in exponents
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
