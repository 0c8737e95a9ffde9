"""What two guests side by side take, of the time that the same tests take one after the other.

Each test boots a guest of its own, preserves a memfd, live-updates and compares. Both ways are
whole runs of pytest with its workers, `-n 1` and `-n 2`, in turns, so that the load of the machine
falls on both alike; each round gives a ratio. The run fails if the median of these is over the
limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pyluo.cli.exit import UNAVAILABLE
from pyluo.vm import Kernel, progress, records
from pyluo.vm.accelerator import Accelerator
from pyluo.vm.qemu import find_binary
from pyluo.vm.records import Outcome
from pyluo.vm.usage import at_once

LIMIT = 0.65
NUMBER = 4  # of tests: pytest-xdist gives two to each worker at once
MEMORY = 512 << 20  # bytes, of a guest
WAYS = {"one after the other": 1, "two side by side": 2}
TESTS = f"""
import pytest
from pyluo import FdStore, Memfd

def save(contents):
    ram = Memfd.create("ram", len(contents))
    ram.write(contents, 0)
    store = FdStore.create("vm0")
    store.add("ram", ram)
    return store

def load():
    with FdStore.retrieve("vm0") as store, store.get("ram", Memfd) as ram:
        return ram.read(ram.size, 0)

@pytest.mark.parametrize("number", range({NUMBER}))
def test_ram_survives(vm, number):
    contents = bytes([number]) * 4096
    vm.hold(save, contents)
    vm.live_update()
    assert vm.call(load) == contents
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--kernel", default="stable")
    parser.add_argument("--json", action="store_true", help="as data, in seconds")
    chosen = parser.parse_args()
    if at_once(MEMORY) < 2:
        print(
            f"two guests side by side cannot be measured here: they need two cores, of which there "
            f"are {len(os.sched_getaffinity(0))}, and 2 GiB of memory",
            file=sys.stderr,
        )
        sys.exit(UNAVAILABLE)
    # What only the first run would do is none of the time.
    Kernel.find(chosen.kernel)
    Accelerator.choose(find_binary())
    measured = measure(chosen.kernel, chosen.rounds)
    one, two = measured.values()
    ratios = [less / more for more, less in zip(one, two, strict=True)]
    ratio = statistics.median(ratios)
    if chosen.json:
        print(json.dumps(measured | {"ratios": ratios, "ratio": ratio, "limit": LIMIT}))
    else:
        show(measured, ratios)
    if ratio > LIMIT:
        sys.exit(f"two guests side by side took {ratio:.3f} of the time, more than {LIMIT}")


def measure(kernel: str, rounds: int) -> dict[str, list[float]]:
    """Seconds by the way that the tests were run."""
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    with progress.bar("side by side", rounds) as reached:
        for number in range(rounds):
            for way, workers in WAYS.items():
                measured[way].append(run(kernel, workers))
            reached(number + 1)
    return measured


def run(kernel: str, workers: int) -> float:
    """Runs the tests, and returns the seconds that it took."""
    with tempfile.TemporaryDirectory(prefix="pyluo-bench-") as name:
        folder = Path(name)
        (folder / "test_ram.py").write_text(TESTS)
        record = folder / "record"
        command = [sys.executable, "-m", "pytest", f"--basetemp={folder / 'tmp'}"]
        command += ["-n", str(workers), f"--pyluo-kernel={kernel}"]
        command += [f"--pyluo-memory={MEMORY}", f"--pyluo-record={record}"]
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        took = time.monotonic() - began
        outcomes = [each.outcome for each in records.read(record)] if record.exists() else []
    if done.returncode or outcomes != [Outcome.PASSED] * NUMBER:
        sys.exit(f"with {workers} at once, the tests did not pass:\n{done.stdout}{done.stderr}")
    return took


def show(measured: dict[str, list[float]], ratios: list[float]) -> None:
    """A table, with the ratios of the rounds below."""
    table = Table("", "median", "least", "most", box=None)
    for way, seconds in measured.items():
        times = (statistics.median(seconds), min(seconds), max(seconds))
        table.add_row(way, *(f"{time:.1f} s" for time in times))
    spread = (statistics.median(ratios), min(ratios), max(ratios))
    table.add_row("ratio", *(f"{ratio:.3f}" for ratio in spread))
    Console().print(table)


if __name__ == "__main__":
    main()
