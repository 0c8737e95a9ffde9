"""What is kept of each test; no guest is needed to die or to fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Death
from pyluo.vm.records import Outcome, Record, read

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """
import os
import pytest
from pyluo.vm import Death, GuestCrash, HarnessError

def crash():
    return GuestCrash(Death.PANIC, "Fatal exception", kernel="k", life=2, console=("a", "b"))

@pytest.fixture
def broken():
    raise ValueError("the fixture")

@pytest.fixture
def unbootable():
    raise crash()

@pytest.fixture
def late():
    yield
    raise HarnessError("too late")

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_crashes(): raise crash()
def test_crashes_in_a_group(): raise ExceptionGroup("both", [ValueError(), crash()])
def test_harness(): raise HarnessError("no disk", "free some")
def test_broken_fixture(broken): pass
def test_crash_in_setup(unbootable): pass
def test_skips(): pytest.skip("no reason")
@pytest.mark.xfail(reason="known")
def test_expected(): assert 0
@pytest.mark.xfail(strict=True)
def test_unexpected(): pass
def test_fails_and_more(late): assert 0
def test_late(late): pass
def test_subtests(subtests):
    for number in range(3):
        with subtests.test(number=number):
            assert number != 1
"""
OUTCOMES = {
    "passes": Outcome.PASSED,
    "fails": Outcome.FAILED,
    "crashes": Outcome.CRASHED,
    "crashes_in_a_group": Outcome.CRASHED,
    "harness": Outcome.ERROR,
    "broken_fixture": Outcome.ERROR,
    "crash_in_setup": Outcome.CRASHED,
    "skips": Outcome.SKIPPED,
    "expected": Outcome.EXPECTED_FAILURE,
    "unexpected": Outcome.FAILED,
    "fails_and_more": Outcome.FAILED,
    "late": Outcome.ERROR,
    "subtests": Outcome.FAILED,
}


def records(pytester: pytest.Pytester, *options: str) -> dict[str, Record]:
    pytester.makepyfile(test_it=TESTS)
    path: Path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}", *options)
    return {record.test.removeprefix("test_it.py::test_"): record for record in read(path)}


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_each_test_has_its_outcome(pytester: pytest.Pytester, workers: list[str]) -> None:
    kept = records(pytester, *workers)
    assert {name: record.outcome for name, record in kept.items()} == OUTCOMES
    assert {record.death for record in kept.values() if record.outcome is Outcome.CRASHED} == {
        Death.PANIC
    }
    assert kept["skips"].reason == "Skipped: no reason"
    assert kept["expected"].reason == "known"
    assert kept["harness"].reason == "HarnessError: no disk: free some"
    assert "kernel panic: Fatal exception" in kept["crashes"].reason
    assert "assert 1 == 2" in kept["fails"].text


def test_a_run_that_dies_leaves_what_it_had(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import os\ndef test_passes(): pass\ndef test_kills(): os.kill(os.getpid(), 9)"
    )
    path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}")
    assert [record.test.partition("::")[2] for record in read(path)] == ["test_passes"]


def test_a_worker_that_dies_takes_its_test_for_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import os\ndef test_kills(): os.kill(os.getpid(), 9)")
    path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}", "-n", "1", "--max-worker-restart=0")
    assert [record.outcome for record in read(path)] == [Outcome.ERROR]
