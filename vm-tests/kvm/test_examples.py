"""The tests of the examples, which are for authors of VMMs to copy, pass as they stand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvm import guest_vmm
from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome
from tests.json_output import read_json
from tests.snippets import run_command

if TYPE_CHECKING:
    from pathlib import Path


EXAMPLES = ["mini_vmm/test_mini_vm.py", "qemu_live_update/test_qemu_vm.py"]


@pytest.mark.parametrize("example", EXAMPLES)
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


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_passes_on_every_route(example: str, tmp_path: Path) -> None:
    folder = guest_vmm.EXAMPLES / example.partition("/")[0]
    page, mini = "docs/guides/matrix.md", "examples/mini_vmm"
    made = run_command(page, 1, {mini: folder})
    assert made.returncode == 0, made.stderr
    replaced: dict[str, str | Path] = {mini: folder}
    hops = [1, 3]
    if not example.startswith("mini_vmm"):
        replaced["2G"] = "4G"
        hops = [1]
    more = ["--json", f"--hops={','.join(map(str, hops))}"]
    done = run_command(page, 2, replaced, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = read_json("vm matrix", done.stdout)
    routes = [(cell["from"], cell["to"], cell["hops"], cell["outcome"]) for cell in cells]
    kernels = ("previous", "stable")
    expected = itertools.product(kernels, kernels, hops, ("passed",))
    assert sorted(routes) == list(expected)
    assert (tmp_path / "page.html").read_text().count("its own clock") == 4 * sum(hops)
