"""Compare the time of two guests side by side with that of the same tests one after the other.

Each test boots a guest of its own, preserves a memfd, live-updates and compares. Each measurement
is a whole run of pytest with its workers, `-n 1` and `-n 2` in turns, so that the load of the
machine affects both alike; each round gives a ratio. The benchmark fails if the median ratio
exceeds the limit. Two guests need two cores, so the number of cores that other programs used
meanwhile is printed as well.
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
from pyluo.vm.machine.accelerator import Choice
from pyluo.vm.machine.capacity import at_once
from pyluo.vm.machine.qemu import find_binary
from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome

LIMIT = 0.65
NUMBER = 4  # tests; pytest-xdist gives two at once to each worker
MEMORY = 512 << 20  # bytes per guest
WAYS = {"one after the other": 1, "two side by side": 2}
TESTS = f"""
import pytest
from pyluo import IncomingStore, KeeperChoice, Memfd, OutgoingStore

def save(contents):
    ram = Memfd.create("ram", len(contents))
    ram.write(contents, 0)
    store = OutgoingStore.create("vm0", keeper=KeeperChoice.NONE)
    store.add("ram", ram)
    return store

def load():
    store = IncomingStore.retrieve("vm0", keeper=KeeperChoice.NONE)
    with store.get("ram", Memfd) as ram:
        store.finish()
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
    arguments = parser.parse_args()
    if at_once(MEMORY) < 2:
        print(
            f"two guests side by side cannot be measured here: they need two cores (this machine "
            f"has {len(os.sched_getaffinity(0))}) and 2 GiB of memory",
            file=sys.stderr,
        )
        sys.exit(UNAVAILABLE)
    # Do first what only the first run would do otherwise, so that it is not measured.
    Kernel.find(arguments.kernel)
    Choice.make(find_binary())
    measured = measure(arguments.kernel, arguments.rounds)
    one, two = ([each.seconds for each in runs] for runs in measured.values())
    ratios = [less / more for more, less in zip(one, two, strict=True)]
    ratio = statistics.median(ratios)
    if arguments.json:
        runs = {way: [each._asdict() for each in runs] for way, runs in measured.items()}
        print(json.dumps(runs | {"ratios": ratios, "ratio": ratio, "limit": LIMIT}))
    else:
        show(measured, ratios)
    if ratio > LIMIT:
        sys.exit(f"two guests side by side took {ratio:.3f} of the time, more than {LIMIT}")


class Run(NamedTuple):
    """One run of all tests.

    Attributes:
        seconds: its duration.
        others: how many cores other programs used meanwhile.
    """

    seconds: float
    others: float


def measure(kernel: str, rounds: int) -> dict[str, list[Run]]:
    """Return the runs, by the way in which the tests were run."""
    measured: dict[str, list[Run]] = {way: [] for way in WAYS}
    with progress.bar("side by side", rounds) as advance:
        for number in range(rounds):
            for way, workers in WAYS.items():
                measured[way].append(run(kernel, workers))
            advance(number + 1)
    return measured


def run(kernel: str, workers: int) -> Run:
    """Run the tests once."""
    with tempfile.TemporaryDirectory(prefix="pyluo-bench-") as name:
        folder = Path(name)
        (folder / "test_ram.py").write_text(TESTS)
        record = folder / "record"
        command = [sys.executable, "-m", "pytest", f"--basetemp={folder / 'tmp'}"]
        command += ["-n", str(workers), f"--pyluo-kernel={kernel}"]
        command += [f"--pyluo-memory={MEMORY}", f"--pyluo-record={record}"]
        began, others = time.monotonic(), read_other_cpu_seconds()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seconds, others = time.monotonic() - began, read_other_cpu_seconds() - others
        outcomes = [each.outcome for each in json_lines.read(record)] if record.exists() else []
    if done.returncode or outcomes != [Outcome.PASSED] * NUMBER:
        sys.exit(f"with {workers} at once, the tests did not pass:\n{done.stdout}{done.stderr}")
    return Run(seconds, others / seconds)


def read_other_cpu_seconds() -> float:
    """Return the CPU seconds used since boot, except by finished children of this process."""
    _, user, nice, system, _, _, irq, softirq, steal, *_ = (
        Path("/proc/stat").read_text().partition("\n")[0].split()
    )
    busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy - times.children_user - times.children_system


def show(measured: dict[str, list[Run]], ratios: list[float]) -> None:
    """Print a table of the times, with the ratios of the rounds in its last row."""
    table = Table("", "median", "least", "most", "cores of others", box=None)
    for way, runs in measured.items():
        others = statistics.median(each.others for each in runs)
        table.add_row(
            way, *format_spread([each.seconds for each in runs], "{:.1f} s"), f"{others:.2f}"
        )
    table.add_row("ratio", *format_spread(ratios, "{:.3f}"))
    Console().print(table)


def format_spread(values: list[float], template: str) -> list[str]:
    """Return the median, the minimum and the maximum as text."""
    return [
        template.format(value) for value in (statistics.median(values), min(values), max(values))
    ]


if __name__ == "__main__":
    main()
