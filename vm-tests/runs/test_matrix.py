"""Tests of `pyluo vm matrix` between two kernels, and of all files that it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from pyluo.vm import Kernel
from tests.json_output import read_json
from tests.snippets import run_command

if TYPE_CHECKING:
    from pathlib import Path

MATRIX = [sys.executable, "-m", "pyluo", "vm", "matrix"]
TESTS = """
def test_each_hop_lands_where_it_should(vm, kernel, next_kernel, hops):
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.life.release == (next_kernel if hop % 2 else kernel).release

def test_that_passes_where_nothing_changes(vm, kernel, next_kernel):
    vm.live_update()
    assert kernel.release == next_kernel.release
"""
WAITS = """
import pathlib, threading

def test_waits(vm, hops):
    vm.live_update()
    if hops == 2:
        pathlib.Path("waiting").touch()
        threading.Event().wait()
"""


def test_all_pairs_with_three_hops_each(tmp_path: Path, kunit_parser: Any) -> None:
    tests = tmp_path / "test_hops.py"
    tests.write_text(TESTS)
    files = {name: tmp_path / name for name in ("html", "junit", "ktap")}
    replaced: dict[str, str | Path] = {
        "--hops 1,3": "--hops 3",
        "page.html": files["html"],
        "tests/": tests,
    }
    more = ["--limit=600", "--json", f"--junit={files['junit']}", f"--ktap={files['ktap']}"]
    done = run_command("docs/guides/matrix.md", 0, replaced, *more)
    assert done.returncode == 1, done.stderr
    cells = read_json("vm matrix", done.stdout)
    releases = {name: Kernel.find(name).release for name in ("previous", "stable")}
    outcomes = [(cell["from"], cell["to"], cell["direction"], cell["outcome"]) for cell in cells]
    assert outcomes == [
        ("previous", "previous", "same", "passed"),
        ("previous", "stable", "upgrade", "failed"),
        ("stable", "previous", "rollback", "failed"),
        ("stable", "stable", "same", "passed"),
    ]
    for cell in cells:
        ends = [cell["from"], cell["to"]]
        assert cell["releases"] == [releases[end] for end in ends]
        hops, changes = cell["tests"]
        assert hops["outcome"] == "passed"
        (guest,) = hops["guests"]
        assert [(jump["origin"], jump["target"]) for jump in guest["jumps"]] == [
            (ends[0], ends[1]), (ends[1], ends[0]), (ends[0], ends[1]),
        ]  # fmt: skip
        assert guest["console"].count("Linux version") == 4
        assert (changes["outcome"] == "passed") == (ends[0] == ends[1])
        assert cell["median_blackout"] > 0
    suites = ElementTree.parse(files["junit"]).getroot()
    assert (suites.get("tests"), suites.get("failures"), suites.get("errors")) == ("8", "2", "0")
    lines = files["ktap"].read_text().splitlines()
    parsed = kunit_parser.parse_run_tests(lines, kunit_parser.Printer(print=False))
    assert (parsed.counts.passed, parsed.counts.failed) == (6, 2)
    page = files["html"].read_text()
    updates = [
        jump
        for cell in cells
        for test in cell["tests"]
        for guest in test["guests"]
        for jump in guest["jumps"]
    ]
    assert page.count('<div class="bar">') == len(updates) == 16
    assert all(release in page for release in releases.values())


def test_the_table_and_the_checks_that_come_with_pyluo(tmp_path: Path) -> None:
    replaced = {"venv/bin/": "", ".,stable": "stable"}
    more = ["--hops=1,2", "--limit=600"]
    done = run_command("docs/guides/ci.md", 3, replaced, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    suites = ElementTree.parse(tmp_path / "matrix.xml").getroot()
    assert (suites.get("tests"), suites.get("failures"), suites.get("errors")) == ("8", "0", "0")
    assert "2: stable to stable" in (tmp_path / "matrix.html").read_text()
    release = Kernel.find("stable").release
    header, one, two = [line for line in done.stdout.splitlines() if "stable" in line]
    assert f"to stable {release}" in header
    for row in (one, two):
        assert f"stable {release}" in row
        assert "same: 4 passed" in row


def test_a_mistake_in_the_tests_is_no_verdict_on_the_kernels(tmp_path: Path) -> None:
    tests = tmp_path / "test_broken.py"
    tests.write_text("def test_nothing(:\n")
    replaced = {".,stable": "stable"}
    done = run_command("docs/guides/kernel-tree.md", 4, replaced, str(tests), cwd=tmp_path)
    assert done.returncode == 69
    assert "pytest ended with status 2" in done.stderr


def test_what_was_tried_before_an_interruption_is_told(tmp_path: Path) -> None:
    tests = tmp_path / "test_waits.py"
    tests.write_text(WAITS)
    page = tmp_path / "page.html"
    page.write_text("of yesterday")
    words = ["--from=stable", "--hops=1,2", "--jobs=1", "--json", f"--html={page}", str(tests)]
    with subprocess.Popen(
        [*MATRIX, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as matrix:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "waiting").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            matrix.send_signal(signal.SIGINT)
            out, _ = matrix.communicate(timeout=60)
        finally:
            if matrix.poll() is None:
                os.killpg(matrix.pid, signal.SIGKILL)
    assert matrix.returncode == 130
    assert [cell["outcome"] for cell in read_json("vm matrix", out)] == ["passed", "no verdict"]
    assert "it was not run to its end" in page.read_text()
    assert [path.name for path in tmp_path.glob("*.part")] == []
