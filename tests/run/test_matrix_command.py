"""Tests of what `pyluo vm matrix` prints and writes, with a fake kernel tree and no guest."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.cli import main
from pyluo.vm.results.pytest_run import PytestRun
from pyluo.vm.results.verdict import Outcome, Verdict
from pyluo.vm.run import pytest_process
from tests.json_output import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunInterrupted = Callable[[list[str]], tuple[int, bytes]]

WORDS = ["vm", "matrix", "--from=.", "--jobs=1"]
MATRIX = [sys.executable, "-m", "pyluo", *WORDS]
TESTS = """
import pathlib, threading
import pytest

def test_by_its_hops(hops):
    if hops == 3:
        pytest.skip("no device")
    assert hops == 1

def test_waits(hops):
    if hops == 2:
        pathlib.Path("waiting").touch()
        threading.Event().wait()
"""


@pytest.fixture(autouse=True)
def _enter_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.parent / "test_it.py").write_text(TESTS)
    monkeypatch.chdir(tree)


def matrix(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MATRIX, *words], capture_output=True, text=True, timeout=120)


def test_a_cell_of_the_table_says_the_result_and_why_it_is_not_a_pass() -> None:
    done = matrix("--hops=1,2,3", "../test_it.py::test_by_its_hops")
    assert done.returncode == 1, done.stderr
    one, two, three = (line for line in done.stdout.splitlines() if "same" in line)
    assert "│ passed, same: 1 passed " in one
    assert "│ failed, same: 1 failed: test_it.py::test_by_its_hops: " in two
    assert "assert 2 == 1" in two
    assert "│ no verdict, same: 1 skipped: no test passed " in three


def test_what_a_route_came_to_before_an_interruption_is_told(
    run_interrupted: RunInterrupted,
) -> None:
    status, out = run_interrupted([*MATRIX, "--hops=1,2,3", "--json", "../test_it.py"])
    assert status == 130
    cells = read_json("vm matrix", out)
    assert [cell["outcome"] for cell in cells] == ["passed", "failed", "no verdict"]
    assert [[test["outcome"] for test in cell["tests"]] for cell in cells] == [
        ["passed", "passed"], ["failed", "no verdict"], [],
    ]  # fmt: skip


async def _run_fake_tests(*_: object, hops: int, **__: Any) -> PytestRun:
    if hops == 2:
        raise ValueError("a mistake")
    return PytestRun((Verdict("t", Outcome.PASSED, text="\udc80"),), 0, "\udc80")


def test_a_mistake_in_the_program_costs_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pytest_process, "run_tests", _run_fake_tests)
    assert main([*WORDS, "--hops=1,2", "--json"]) == 69
    printed = capsys.readouterr()
    assert "ValueError: a mistake" in printed.err
    cells = read_json("vm matrix", printed.out)
    assert [cell["outcome"] for cell in cells] == ["passed", "no verdict"]


def test_the_page_takes_what_is_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pytest_process, "run_tests", _run_fake_tests)
    assert main([*WORDS, "--hops=1", f"--html={tmp_path}/page.html"]) == 0
    assert "<pre>?</pre>" in (tmp_path / "page.html").read_text()


def test_a_full_disk_costs_no_result() -> None:
    done = matrix("--hops=1", "--junit=/dev/full", "../test_it.py::test_by_its_hops")
    assert done.returncode == 69
    assert "No space left" in done.stderr
    assert "passed, same: 1 passed" in done.stdout
