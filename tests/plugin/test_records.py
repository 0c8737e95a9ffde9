"""Tests of the record of each test; none needs a guest, not even to crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Complaint
from pyluo.vm.results import ktap_reader
from pyluo.vm.results.json_lines import read
from pyluo.vm.results.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """
import os
import pytest
from pyluo.vm import Death, GuestCrash, HarnessError, Complaint

def crash():
    return GuestCrash(Complaint.PANIC, "Fatal exception", kernel="k", life=2, console=("a", "b"))

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
def test_subtest_skips(subtests):
    with subtests.test("mmap"):
        pytest.skip("no device")
def test_subtest_is_expected(subtests):
    with subtests.test("mmap"):
        pytest.xfail("known")
def test_subtest_fails_and_the_test_skips(subtests):
    with subtests.test("mmap"):
        assert 0
    pytest.skip("the rest")
def test_subtest_fails_before_a_crash(subtests):
    with subtests.test("mmap"):
        assert 0
    raise crash()
def test_subtest_fails_before_qemu_is_killed(subtests):
    with subtests.test("mmap"):
        assert 0
    raise GuestCrash(Death.QEMU, "killed by SIGKILL", kernel="k", life=1, console=())
def test_subtest_harness(subtests):
    with subtests.test():
        raise HarnessError("no disk")
def test_subtest_crashes(subtests):
    with subtests.test("first"):
        raise HarnessError("no disk")
    with subtests.test("second"):
        assert 0
    with subtests.test("mmap", size=4096):
        raise crash()
def test_subtest_fails_before_the_teardown(subtests, late):
    with subtests.test("mmap"):
        assert 0
"""
OUTCOMES = {
    "passes": Outcome.PASSED,
    "fails": Outcome.FAILED,
    "crashes": Outcome.CRASHED,
    "crashes_in_a_group": Outcome.CRASHED,
    "harness": Outcome.NO_VERDICT,
    "broken_fixture": Outcome.NO_VERDICT,
    "crash_in_setup": Outcome.CRASHED,
    "skips": Outcome.SKIPPED,
    "expected": Outcome.EXPECTED_FAILURE,
    "unexpected": Outcome.FAILED,
    "fails_and_more": Outcome.FAILED,
    "late": Outcome.NO_VERDICT,
    "subtests": Outcome.FAILED,
    "subtest_skips": Outcome.PASSED,
    "subtest_is_expected": Outcome.PASSED,
    "subtest_fails_and_the_test_skips": Outcome.FAILED,
    "subtest_fails_before_a_crash": Outcome.CRASHED,
    "subtest_fails_before_qemu_is_killed": Outcome.NO_VERDICT,
    "subtest_harness": Outcome.NO_VERDICT,
    "subtest_crashes": Outcome.CRASHED,
    "subtest_fails_before_the_teardown": Outcome.FAILED,
}


NOT_OK = (Outcome.CRASHED, Outcome.NO_VERDICT)  # which KTAP tells from a failure by the reason


def read_records(pytester: pytest.Pytester, *options: str) -> dict[str, Verdict]:
    pytester.makepyfile(test_it=TESTS)
    path: Path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}", *options)
    return {record.name.removeprefix("test_it.py::test_"): record for record in read(path)}


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_each_test_has_its_outcome(pytester: pytest.Pytester, workers: list[str]) -> None:
    verdicts = read_records(pytester, *workers)
    assert {name: record.outcome for name, record in verdicts.items()} == OUTCOMES
    assert {record.cause for record in verdicts.values() if record.outcome is Outcome.CRASHED} == {
        Complaint.PANIC
    }
    assert verdicts["skips"].reason == "Skipped: no reason"
    assert verdicts["expected"].reason == "known"
    assert verdicts["harness"].reason == "HarnessError: no disk: free some"
    assert "kernel panic: Fatal exception" in verdicts["crashes"].reason
    assert "assert 1 == 2" in verdicts["fails"].text


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_each_subtest_is_kept_by_its_name(pytester: pytest.Pytester, workers: list[str]) -> None:
    verdicts = read_records(pytester, *workers)
    assert [(each.name, each.outcome) for each in verdicts["subtests"].subtests] == [
        ("number=0", Outcome.PASSED), ("number=1", Outcome.FAILED), ("number=2", Outcome.PASSED),
    ]  # fmt: skip
    assert verdicts["subtests"].reason == "number=1: AssertionError: assert 1 != 1"
    assert "assert 1 != 1" in verdicts["subtests"].text
    (skipped,) = verdicts["subtest_skips"].subtests
    assert (skipped.name, skipped.outcome) == ("mmap", Outcome.SKIPPED)
    assert verdicts["subtest_skips"].text == ""
    (expected,) = verdicts["subtest_is_expected"].subtests
    assert (expected.outcome, expected.reason) == (Outcome.EXPECTED_FAILURE, "known")
    crashed = verdicts["subtest_crashes"]
    assert crashed.reason.startswith("mmap, size=4096: GuestCrash: kernel panic: Fatal exception")
    assert (crashed.cause, crashed.subtests[2].cause) == (Complaint.PANIC, Complaint.PANIC)
    assert verdicts["subtest_harness"].reason == "subtest: HarnessError: no disk"


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_the_verdicts_on_all_tests_are_written_in_ktap(
    pytester: pytest.Pytester, workers: list[str]
) -> None:
    pytester.makepyfile(test_it=TESTS, test_another="class TestIt:\n    def test_it(self): pass")
    document = pytester.path / "ktap"
    pytester.runpytest_subprocess(f"--pyluo-ktap={document}", *workers)
    another, it = ktap_reader.parse(document.read_text()).results
    assert (another.name, another.outcome) == ("test_another.py", Outcome.PASSED)
    assert another.subtests is not None
    assert [test.name for test in another.subtests.results] == ["TestIt::test_it"]
    assert (it.name, it.outcome) == ("test_it.py", Outcome.FAILED)
    assert it.subtests is not None
    written = {test.name.removeprefix("test_"): test for test in it.subtests.results}
    assert {name: test.outcome for name, test in written.items()} == {
        name: Outcome.FAILED if outcome in NOT_OK else outcome for name, outcome in OUTCOMES.items()
    }
    assert written["harness"].reason == "no verdict: HarnessError: no disk: free some"
    subtests = written["subtests"].subtests
    assert subtests is not None
    assert [(case.name, case.failed) for case in subtests.results] == [
        ("number=0", False), ("number=1", True), ("number=2", False),
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["--pyluo-record", "--pyluo-ktap"])
def test_a_file_that_cannot_be_written_is_told_before_the_first_test(
    pytester: pytest.Pytester, option: str
) -> None:
    pytester.makepyfile("def test_it(): pass")
    run = pytester.runpytest_subprocess(f"{option}=no/such/folder")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"ERROR: {option}: *no/such/folder*"])


def test_the_time_of_a_subtest_is_part_of_its_tests(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(report):
            if isinstance(report, pytest.SubtestReport):
                report.duration = 1000
        """
    )
    assert read_records(pytester)["subtests"].seconds < 1000


def test_a_run_that_dies_leaves_what_it_had(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import os\ndef test_passes(): pass\ndef test_kills(): os.kill(os.getpid(), 9)"
    )
    path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}")
    assert [record.name.partition("::")[2] for record in read(path)] == ["test_passes"]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("pytest.exit('enough')", Outcome.NO_VERDICT),
        ("raise KeyboardInterrupt", Outcome.NO_VERDICT),
        ("request.addfinalizer(lambda: pytest.exit('enough')); assert 0", Outcome.FAILED),
    ],
)
def test_what_was_not_run_to_its_end_has_not_passed(
    pytester: pytest.Pytester, body: str, outcome: Outcome
) -> None:
    pytester.makepyfile(f"import pytest\ndef test_it(request):\n    {body}")
    path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}")
    (record,) = read(path)
    assert record.outcome is outcome
    assert (record.reason == "it was not run to its end") == (outcome is Outcome.NO_VERDICT)


def test_what_a_test_says_can_be_printed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:replace")
    pytester.makepyfile(r"def test_it(): raise ValueError('\udc80 and \u2028 \r')")
    path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}")
    (record,) = read(path)
    assert record.reason == "ValueError: ? and \u2028 \r"


def test_a_worker_that_dies_takes_its_test_for_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import os\ndef test_kills(): os.kill(os.getpid(), 9)")
    path = pytester.path / "record"
    pytester.runpytest_subprocess(f"--pyluo-record={path}", "-n", "1", "--max-worker-restart=0")
    assert [record.outcome for record in read(path)] == [Outcome.NO_VERDICT]
