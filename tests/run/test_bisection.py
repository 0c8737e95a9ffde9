"""Tests of what `git bisect run` is told, with a fake kernel tree and without a guest."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.json_output import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunInterrupted = Callable[[list[str]], tuple[int, bytes]]

PYLUO = [sys.executable, "-m", "pyluo", "vm", "bisect"]
TESTS = """
import pytest
from pyluo.vm import Death, GuestCrash, HarnessError, Complaint
from pyluo.vm.machine.timeline import GuestLog
from pyluo.vm.machine.usage import usage

def use_guest(): usage.ended.append(GuestLog("k", (), ""))
def test_passes(): use_guest()
def test_alone(): pass
def test_fails(): assert "seals" == "gone"
def test_skips(): pytest.skip("no device")
def test_qemu(): raise GuestCrash(Death.QEMU, "killed by SIGKILL", kernel="k", life=1, console=())
@pytest.mark.xfail
def test_expected(): raise HarnessError("no QEMU")
def test_harness(): raise HarnessError("no QEMU")
def test_untraced(): pytest.fail("the cases failed\\nsoft lockup", pytrace=False)
def test_subtests(subtests):
    with subtests.test("one"):
        assert "hole" == "filled"
    with subtests.test("two"):
        pytest.fail("not ok\\nsoft lockup", pytrace=False)
    with subtests.test("three"):
        raise HarnessError("no QEMU")
def test_crash(): raise GuestCrash(Complaint.OOPS, "NULL", kernel="k", life=1, console=())
def test_unbootable():
    raise GuestCrash(Death.SILENT, "no word", kernel="k", life=1, console=(), booted=False)
def test_edits(request):
    import pathlib
    use_guest()
    pathlib.Path("init.c").write_text("int edited;")
    request.getfixturevalue("kernel")
    assert len(pathlib.Path("../compilations").read_text().split()) == 1
def test_waits():
    import pathlib, threading
    pathlib.Path("waiting").touch()
    threading.Event().wait()
"""


@pytest.fixture(autouse=True)
def _enter_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.parent / "test_it.py").write_text(TESTS)
    (tree.parent / "test_broken.py").write_text("def test_nothing(:\n")
    monkeypatch.chdir(tree)


def bisect(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYLUO, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("tests", "status", "message"),
    [
        (["../test_it.py::test_passes"], 0, "Linux 7.9.9 is good"),
        (["../test_it.py::test_alone"], 125, "no test that passed used a guest"),
        (["../test_it.py::test_fails"], 1, "is bad: "),
        (["../test_it.py::test_crash"], 1, "kernel oops: NULL"),
        (["../test_it.py::test_passes", "../test_it.py::test_fails"], 1, "is bad: "),
        (["../test_it.py::test_harness"], 125, "skipped: "),
        (["../test_it.py::test_qemu"], 125, "killed by SIGKILL"),
        (["../test_it.py::test_expected"], 125, "no QEMU"),
        (["--", "--continue-on-collection-errors", "..", "-k", "passes"], 125, "no test tells why"),
        (["--match=def test_fails", "../test_it.py::test_fails"], 125, "another reason"),
        (["../test_it.py::test_passes", "../test_it.py::test_harness"], 125, "no QEMU"),
        (["../test_it.py::test_unbootable"], 125, "it does not boot: "),
        (["--unbootable=bad", "../test_it.py::test_unbootable"], 1, "it does not boot: "),
        (["../test_it.py::test_unbootable", "../test_it.py::test_crash"], 1, "kernel oops: NULL"),
        (["../test_it.py::test_skips"], 125, "no test passed"),
        (["../test_it.py::test_no_such"], 125, "pytest ended with status 4"),
        (["../no-such-file.py"], 125, "pytest ended with status 4"),
        (["--", "-x", "../no-such-file.py::test_it"], 125, "pytest ended with status 4"),
        (["../test_broken.py"], 125, "pytest ended with status 2"),
        (["--", "../test_it.py", "-k", "no_such"], 125, "no test ran"),
        (["--match=gone", "../test_it.py::test_fails"], 1, "is bad: "),
        (["--match=soft lockup", "../test_it.py::test_fails"], 125, "it failed for another reason"),
        (["--match=soft lockup", "../test_it.py::test_untraced"], 1, "is bad: "),
        (["--match=soft lockup", "../test_it.py::test_subtests"], 1, "is bad: "),
        (["--match=subtests.test", "../test_it.py::test_subtests"], 125, "another reason"),
        (["--match=QEMU", "../test_it.py::test_subtests"], 125, "another reason"),
        (["--config=no-such-file", "../test_it.py::test_fails"], 125, "there is no kernel to test"),
        (["--limit=2", "../test_it.py::test_waits"], 125, "the tests still ran after 2 s"),
        (["--tree=..", "../test_it.py::test_fails"], 125, "there is no kernel"),
    ],
)
def test_only_a_test_that_failed_makes_a_kernel_bad(
    tests: list[str], status: int, message: str
) -> None:
    done = bisect(*tests)
    assert (done.returncode, message in done.stdout) == (status, True), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ([], True),
        (["-x"], True),
        (["-k", "hop or here"], True),
        (["-k", "kernel or hop"], True),
        (["-k", "live_update", "-m", "not slow", "-p", "no:doctest"], True),
        (["-x", "."], False),
        ([".", "-x"], False),
        (["test_here.py::test_here"], False),
        (["--pyargs", "test_here"], False),
    ],
)
def test_options_alone_are_for_the_checks_that_come_with_pyluo(
    words: list[str], own: bool, tree: Path
) -> None:
    (tree / "test_here.py").write_text("def test_here(): pass")
    for word in words:  # in a kernel tree there are folders of many names
        if word[0] not in "-." and "." not in word and not word.startswith("test_"):
            (tree / word).mkdir()
    done = bisect("--", "--collect-only", "-q", *words)
    assert done.returncode == 125
    assert ("test_here" in done.stdout, "test_live_update" in done.stdout) == (not own, own)


@pytest.mark.parametrize("config", [[], ["--config=CONFIG_A=y", "--config=CONFIG_B=y"]])
def test_the_kernel_is_the_one_that_was_built_though_the_tree_is_edited(config: list[str]) -> None:
    done = bisect(*config, "../test_it.py::test_edits")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_does_not_compile_is_passed_over(tree: Path) -> None:
    (tree / "init.c").write_text("not C\n")
    done = bisect("../test_it.py::test_fails")
    assert done.returncode == 125
    assert "init.c: error: this is not C" in done.stdout


@pytest.mark.parametrize(
    "words", [["--no-such-option"], ["--hops=0"], ["--match=("], ["--from=a", "--to=b"]]
)
def test_a_mistake_in_the_command_is_no_verdict(words: list[str]) -> None:
    done = bisect(*words)
    assert done.returncode == 125
    assert "usage: pyluo" in done.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "words", [["--json", "../test_it.py::test_passes"], ["../test_it.py::test_fails"], ["--tree"]]
)
def test_a_step_that_cannot_be_told_is_no_verdict(
    words: list[str], stream: str, broken_output: int
) -> None:
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: broken_output}
    out, err = streams["stdout"], streams["stderr"]
    done = subprocess.run([*PYLUO, *words], stdout=out, stderr=err, timeout=120)
    assert done.returncode == 125


def test_the_step_as_data() -> None:
    done = bisect("--json", "../test_it.py::test_fails")
    assert done.returncode == 1
    step = read_json("vm bisect", done.stdout)
    assert (step["mark"], step["release"]) == ("bad", "7.9.9")
    assert [test["outcome"] for test in step["tests"]] == ["failed"]
    assert "1 failed" in done.stderr


@pytest.mark.parametrize("background", [[], ["env", "--ignore-signal=INT"]])
def test_a_test_that_still_ran_at_the_limit_has_not_passed(background: list[str]) -> None:
    tests = ["../test_it.py::test_passes", "../test_it.py::test_waits"]
    command = [*background, *PYLUO, "--json", "--limit=8", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    step = read_json("vm bisect", done.stdout)
    assert (step["mark"], step["reason"]) == ("skip", "the tests still ran after 8 s")
    assert [(test["outcome"], test["reason"]) for test in step["tests"]] == [
        ("passed", ""), ("no verdict", "it was not run to its end"),
    ]  # fmt: skip


def test_an_interruption_ends_the_bisection_and_the_tests(run_interrupted: RunInterrupted) -> None:
    status, _ = run_interrupted([*PYLUO, "../test_it.py::test_waits"])
    assert status == 130
