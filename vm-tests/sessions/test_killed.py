"""Tests of what is lost when a process is killed between two steps of a live update.

Each test compares an outcome with its cell in the manual's table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyluo import kexec
from pyluo.vm import VM, HarnessError
from sessions import guest_killed

if TYPE_CHECKING:
    from pyluo.vm import Kernel

MANUAL = Path(__file__).parents[2] / "docs" / "explanation" / "who-dies-when.md"
HEADING = "## Who dies when, and what is lost"
WORDS = {
    "lost": "lost",
    "kept by the other": "here",
    "carried over": "carried",
    "can be retrieved": "retrievable",
}


def read_table_of_manual() -> dict[str, str]:
    """Read the manual's table: an outcome for each case, by its name."""
    section = MANUAL.read_text().split(HEADING, 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    columns = rows[0][1:]
    return {
        f"{row[0]}, {shared}": WORDS[cell]
        for row in rows[2:]
        for shared, cell in zip(columns, row[1:], strict=True)
        if cell != "-"
    }


TABLE = read_table_of_manual()
CASES = [case.name for case in guest_killed.cases(guest_killed.BEFORE + guest_killed.AFTER)]


@pytest.fixture(scope="module")
def outcomes(kernel: Kernel) -> dict[str, str]:
    """The outcome of each case; all cases share one guest and one jump."""
    with VM(kernel) as vm:
        image = os.fspath(vm.kernel.image)
        cmdline = vm.run(["cat", "/proc/cmdline"]).stdout.decode().strip()
        vm.hold(guest_killed.preserve_for_after)
        killed = vm.hold(guest_killed.kill_all_before, image, cmdline)
        known = vm.call(get_outcomes_before_jump, killed)
        with pytest.raises(HarnessError, match="booted again"):
            vm.call(kexec.reboot)  # jumps into the image that a victim loaded
        before: dict[str, str] = vm.call(guest_killed.outcomes_after_the_jump, known)
        after: dict[str, str] = vm.call(guest_killed.kill_all_after)
        vm.live_update()
        return before | after | vm.call(guest_killed.renewals_completed)


@pytest.mark.parametrize("case", CASES)
def test_killed_after(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == TABLE[case]


def test_the_manual_has_a_cell_for_each_case_and_no_other() -> None:
    assert sorted(TABLE) == sorted(CASES)


def get_outcomes_before_jump(killed: tuple[dict[str, str], list[object]]) -> dict[str, str]:
    return killed[0]
