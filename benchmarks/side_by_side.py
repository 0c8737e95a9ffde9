"""Two guests side by side, and the same tests one after the other.

Each test boots a guest of its own, preserves a memfd, live-updates and compares. Each time is that
of a whole run of pytest with its workers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ratios import Pair
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine.capacity import at_once
from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome

if TYPE_CHECKING:
    from benchmarks.ratios import Pairs

__all__ = ["parallel_ratio"]

NUMBER = 4  # tests; pytest-xdist gives two at once to each worker
MEMORY = 512 << 20  # bytes per guest
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


def parallel_ratio(kernel: str, rounds: int) -> Pairs:
    """Run the tests by two workers, and by one."""
    if at_once(MEMORY) < 2:
        raise HarnessError(
            "two guests side by side cannot be measured here",
            "they need two cores and 2 GiB of memory",
        )
    for _ in range(rounds):
        yield Pair(_run(kernel, 2), _run(kernel, 1))


def _run(kernel: str, workers: int) -> float:
    """Run the tests once; return the seconds."""
    with tempfile.TemporaryDirectory(prefix="pyluo-bench-") as name:
        folder = Path(name)
        (folder / "test_ram.py").write_text(TESTS)
        record = folder / "record"
        command = [sys.executable, "-m", "pytest", f"--basetemp={folder / 'tmp'}"]
        command += ["-n", str(workers), f"--pyluo-kernel={kernel}"]
        command += [f"--pyluo-memory={MEMORY}", f"--pyluo-record={record}"]
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        outcomes = [each.outcome for each in json_lines.read(record)] if record.exists() else []
    if done.returncode or outcomes != [Outcome.PASSED] * NUMBER:
        raise HarnessError(
            f"with {workers} at once, the tests did not pass:\n{done.stdout}{done.stderr}"
        )
    return seconds
