"""What is lost when a process is killed between two steps of a live update.

The table in the manual is what these tests measure: they compare it with what came out.
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

MANUAL = Path(__file__).parents[2] / "docs" / "manual.md"
HEADING = "## Who dies when, and what is lost"
WORDS = {
    "lost": "lost",
    "kept by the other": "here",
    "carried over": "carried",
    "can be retrieved": "retrievable",
}


def table_of_the_manual() -> dict[str, str]:
    """What the manual says, by the names of the cases."""
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


TABLE = table_of_the_manual()
CASES = [case.name for case in guest_killed.cases(guest_killed.BEFORE + guest_killed.AFTER)]


@pytest.fixture(scope="module")
def outcomes(kernel: Kernel) -> dict[str, str]:
    """What became of each case; one guest sees them all, and one jump."""
    with VM(kernel) as vm:
        image = os.fspath(vm.kernel.image)
        cmdline = vm.run(["cat", "/proc/cmdline"]).stdout.decode().strip()
        vm.hold(guest_killed.preserve_for_after)
        killed = vm.hold(guest_killed.kill_all_before, image, cmdline)
        known = vm.call(known_before, killed)
        with pytest.raises(HarnessError, match="booted again"):
            vm.call(kexec.reboot)  # into the image that a victim loaded
        before: dict[str, str] = vm.call(guest_killed.outcomes_after_the_jump, known)
        return before | vm.call(guest_killed.kill_all_after)


@pytest.mark.parametrize("case", CASES)
def test_killed_after(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == TABLE[case]


def test_the_manual_has_a_cell_for_each_case_and_no_other() -> None:
    assert sorted(TABLE) == sorted(CASES)


def known_before(killed: tuple[dict[str, str], list[object]]) -> dict[str, str]:
    return killed[0]
