"""The tests of the examples, which are for authors of VMMs to copy, pass as they stand."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvm import guest_vmm
from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "example", ["mini_vmm/test_mini_vm.py", "qemu_live_update/test_qemu_vm.py"]
)
def test_an_example_passes_and_records_the_gap_of_its_vm(example: str, tmp_path: Path) -> None:
    record = tmp_path / "record"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--pyluo-record={record}"),
            *("--pyluo-kernel=previous", "--pyluo-to=stable", "--pyluo-cpus=2"),
            "--pyluo-memory=4G",
            example,
        ],
        cwd=guest_vmm.EXAMPLES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    [verdict] = json_lines.read(record)
    assert verdict.outcome is Outcome.PASSED
    [guest] = verdict.guests
    [jump] = guest.jumps
    [gap] = jump.timeline.gaps
    assert gap.vm == "vm0"
    names = [event.name for event in gap.events]
    assert names == ["paused", "stored", "resumed", "heard again"]
    assert gap.events[1].at < jump.timeline.started < gap.events[2].at
    assert gap.regressions == ()
    assert gap.counted is not None
    assert gap.counted >= 0
    assert gap.clock is not None
    assert gap.clock > 0
    assert gap.length is not None
    assert jump.blackout is not None
    assert gap.length > jump.blackout
