"""What two guests side by side take, of the time that the same tests take one after the other.

Each test boots a guest of its own, preserves a memfd, live-updates and compares. Both ways are
whole runs of pytest with its workers, `-n 1` and `-n 2`, in turns, so that the load of the machine
falls on both alike; each round gives a ratio. The run fails if the median of these is over the
limit. Two guests need two cores: how many of them other programs used meanwhile is told as well.
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
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pyluo.cli.exit import UNAVAILABLE
from pyluo.vm import Kernel, progress
from pyluo.vm.machine.accelerator import Accelerator
from pyluo.vm.machine.qemu import find_binary
from pyluo.vm.machine.usage import at_once
from pyluo.vm.pytest import recorder
from pyluo.vm.pytest.recorder import Outcome

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
    one, two = ([each.seconds for each in runs] for runs in measured.values())
    ratios = [less / more for more, less in zip(one, two, strict=True)]
    ratio = statistics.median(ratios)
    if chosen.json:
        runs = {way: [each._asdict() for each in runs] for way, runs in measured.items()}
        print(json.dumps(runs | {"ratios": ratios, "ratio": ratio, "limit": LIMIT}))
    else:
        show(measured, ratios)
    if ratio > LIMIT:
        sys.exit(f"two guests side by side took {ratio:.3f} of the time, more than {LIMIT}")


class Run(NamedTuple):
    """One run of all tests.

    Attributes:
        seconds: that it took.
        others: how many cores other programs used meanwhile.
    """

    seconds: float
    others: float


def measure(kernel: str, rounds: int) -> dict[str, list[Run]]:
    """The runs, by the way that the tests were run."""
    measured: dict[str, list[Run]] = {way: [] for way in WAYS}
    with progress.bar("side by side", rounds) as reached:
        for number in range(rounds):
            for way, workers in WAYS.items():
                measured[way].append(run(kernel, workers))
            reached(number + 1)
    return measured


def run(kernel: str, workers: int) -> Run:
    """Runs the tests."""
    with tempfile.TemporaryDirectory(prefix="pyluo-bench-") as name:
        folder = Path(name)
        (folder / "test_ram.py").write_text(TESTS)
        record = folder / "record"
        command = [sys.executable, "-m", "pytest", f"--basetemp={folder / 'tmp'}"]
        command += ["-n", str(workers), f"--pyluo-kernel={kernel}"]
        command += [f"--pyluo-memory={MEMORY}", f"--pyluo-record={record}"]
        began, others = time.monotonic(), used_by_others()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        took, others = time.monotonic() - began, used_by_others() - others
        outcomes = [each.outcome for each in recorder.read(record)] if record.exists() else []
    if done.returncode or outcomes != [Outcome.PASSED] * NUMBER:
        sys.exit(f"with {workers} at once, the tests did not pass:\n{done.stdout}{done.stderr}")
    return Run(took, others / took)


def used_by_others() -> float:
    """Seconds of all cores so far, but for what this process has started and waited for."""
    _, user, nice, system, _, _, irq, softirq, steal, *_ = (
        Path("/proc/stat").read_text().partition("\n")[0].split()
    )
    busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy - times.children_user - times.children_system


def show(measured: dict[str, list[Run]], ratios: list[float]) -> None:
    """A table, with the ratios of the rounds below."""
    table = Table("", "median", "least", "most", "cores of others", box=None)
    for way, runs in measured.items():
        others = statistics.median(each.others for each in runs)
        table.add_row(way, *spread([each.seconds for each in runs], "{:.1f} s"), f"{others:.2f}")
    table.add_row("ratio", *spread(ratios, "{:.3f}"))
    Console().print(table)


def spread(values: list[float], form: str) -> list[str]:
    """The median, the least and the most."""
    return [form.format(value) for value in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()
