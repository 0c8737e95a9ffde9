"""Tests that the plugin changes nothing for a project that has pyluo installed and no guests."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = """
import pytest


@pytest.fixture
def _options(): return 1


@pytest.fixture
def _to(): return 2


@pytest.fixture
def _shared(): return 3


def test_fixtures(_options, _to, _shared): assert (_options, _to, _shared) == (1, 2, 3)


def test_subtests(subtests):
    for number in range(3):
        with subtests.test(number=number):
            assert number != 1


def test_fails(): assert 1 == 2


@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""
TIMES = re.compile(r'(?:time|timestamp|hostname)="[^"]*"|0x[0-9a-f]+|gw[0-9]')


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "test_it.py").write_text(PROJECT)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run(project: Path, *words: str) -> tuple[str, str]:
    """Run pytest in the project; return what it printed, without times, and its JUnit document."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--junitxml=junit.xml", *words],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    printed = re.sub(
        # A line is padded with = to the width of the terminal: to more, the shorter the time is.
        r"in [0-9.]+s( \([0-9:]+\))?|={3,}|plugins: .*|0x[0-9a-f]+|^[.uFs]+ +\[|gw\d",
        "",
        done.stdout,
        flags=re.MULTILINE,
    )
    return printed, TIMES.sub("", (project / "junit.xml").read_text())


def read_cases(junit: str) -> list[str]:
    """Return the cases of a file of JUnit in an order of their own: workers end in any order."""
    inside = junit.partition("<testcase")[2].partition("</testsuite>")[0]
    return sorted(inside.split("<testcase"))


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_output_and_junit_are_as_without_it(project: Path, workers: list[str]) -> None:
    with_it = run(project, "-p", "no:randomly", *workers)
    without_it = run(project, "-p", "no:randomly", "-p", "no:pyluo", *workers)
    assert sorted(with_it[0].splitlines()) == sorted(without_it[0].splitlines())
    cases, cases_without = (read_cases(junit) for _, junit in (with_it, without_it))
    assert cases == cases_without
    assert len(cases) == 4


def test_arguments_may_be_paths(project: Path) -> None:
    code = "import pathlib, pytest; raise SystemExit(pytest.main([pathlib.Path('test_it.py')]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr


def test_auto_is_the_number_of_workers_that_it_is_without_it(project: Path) -> None:
    (project / "conftest.py").write_text("def pytest_xdist_auto_num_workers(): return 5\n")
    printed, _ = run(project, "-n", "auto")
    assert "5 workers" in printed


def test_it_imports_nothing_that_boots_guests(project: Path) -> None:
    (project / "conftest.py").write_text(
        "import sys\n"
        "def pytest_sessionfinish():\n"
        "    names = [name for name in sys.modules if name.startswith('pyluo')]\n"
        "    open('modules', 'w').write('\\n'.join(names))\n"
    )
    run(project)
    imported = set((project / "modules").read_text().split())
    assert imported == {
        "pyluo", "pyluo.vm", "pyluo.vm.pytest", "pyluo.vm.pytest.plugin",
        "pyluo.vm.pytest.fixtures", "pyluo.vm.pytest.summary", "pyluo.vm.machine",
        "pyluo.vm.machine.options", "pyluo.vm.machine.usage",
    }  # fmt: skip


def test_a_test_that_is_run_again_has_the_verdict_of_its_last_run(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        "runs = []\ndef test_passes_later():\n    runs.append(1)\n    assert len(runs) == 2\n"
    )
    pytester.makeconftest(
        "from _pytest.runner import runtestprotocol\n"
        "def pytest_runtest_protocol(item, nextitem):\n"
        "    hook = item.ihook\n"
        "    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)\n"
        "    for report in runtestprotocol(item, nextitem=nextitem, log=False):\n"
        "        if report.failed: report.outcome = 'rerun'\n"
        "        hook.pytest_runtest_logreport(report=report)\n"
        "    item._initrequest()\n"
        "    for report in runtestprotocol(item, nextitem=nextitem, log=False):\n"
        "        hook.pytest_runtest_logreport(report=report)\n"
        "    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)\n"
        "    return True\n"
    )
    pytester.runpytest_subprocess("--pyluo-record=record")
    (line,) = (pytester.path / "record").read_text().splitlines()
    assert '"outcome": "passed"' in line


def measure(project: Path, *words: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *words],
        cwd=project,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


if __name__ == "__main__":  # a measurement, which no test asserts
    from pathlib import Path as _Path

    folder = _Path(sys.argv[1])
    pairs = [(measure(folder), measure(folder, "-p", "no:pyluo")) for _ in range(15)]
    print(statistics.median(one - other for one, other in pairs))
