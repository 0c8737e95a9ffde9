"""Run tests by a worker of another environment, and in a project of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome
from tests.snippets import command

if TYPE_CHECKING:
    import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "test-project"
MEMORY = 512 << 20
# Stands in for the ssh that pytest-xdist runs: it stays on this machine, and passes on nothing of
# the environment.
SSH = """\
#!/bin/sh -e
[ $# = 3 -a "$1" = -C -a "$2" = elsewhere ]
cd "{home}"
exec env -i HOME="{home}" PATH="$PATH" sh -c "$3"
"""
TESTS = """
import json, os, sys
from pathlib import Path
import pyluo

def make_ram():
    return pyluo.Memfd.create("ram", 4096)

def guest():
    return pyluo.__file__, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

def test_live_updates(vm):
    vm.hold(make_ram)
    vm.live_update()
    report = [sys.executable, pyluo.__file__, *vm.call(guest)]
    Path("report.json").write_text(json.dumps(report))

def test_fails(shared_vm):
    assert shared_vm.call(os.getpid) == 0
"""


def test_a_worker_of_another_environment_runs_the_tests_there_and_reports_home(
    pytester: pytest.Pytester, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, home, far, near = (pytester.mkdir(name) for name in ("tools", "home", "far", "near"))
    ssh = tools / "ssh"
    ssh.write_text(SSH.format(home=home))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (far / "test_far.py").write_text(TESTS)
    (far / "test_left_out.py").write_text("def test_is_not_asked_for(): pass")
    python = installed / "bin" / "python"
    cache = os.environ["XDG_CACHE_HOME"]
    monkeypatch.chdir(near)
    replaced: dict[str, str | Path] = {
        "--tx '2*popen'": "",  # all tests run there
        "8*ssh=me@big": "ssh=elsewhere",
        "/srv/project/.venv/bin/python": python,
        "/srv/project": f"{far}//env:XDG_CACHE_HOME={cache}",
        "testpaths=tests": "testpaths=test_far.py",
        "restart=4": "restart=0",
    }
    words = shlex.split(command("docs/guides/scale-out.md", 1, replaced))[1:]
    outcome = pytester.runpytest_subprocess(
        *words, f"--pyluo-memory={MEMORY}", "--pyluo-record=record"
    )
    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines(
        ["vm-tests: 2 ran, 2 of them drove a guest; guests booted: 2, live updates made: 1"]
    )
    here, there, in_guest, memory = json.loads((far / "report.json").read_text())
    assert here == os.fspath(python)
    assert Path(there).is_relative_to(installed)
    assert in_guest == there
    assert memory < MEMORY
    passed, failed = json_lines.read(near / "record")
    assert (passed.outcome, failed.outcome) == (Outcome.PASSED, Outcome.FAILED)
    assert [jump.landed for guest in passed.guests for jump in guest.jumps] == [True]
    assert [bool(guest.console) for guest in failed.guests] == [True]


def test_files_are_spread_over_workers(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "2")
    pytester.makepyfile(
        **{f"test_{name}": "def test_nothing(): pass\ndef test_either(): pass" for name in "abc"}
    )
    words = shlex.split(command("docs/guides/scale-out.md", 0))[1:]
    outcome = pytester.runpytest_subprocess(*words, "-v")
    outcome.assert_outcomes(passed=6)
    ran = [
        re.fullmatch(r"\[(gw\d+)\].* PASSED (test_\w+)\.py::.*", each) for each in outcome.outlines
    ]
    places = {(each[2], each[1]) for each in ran if each}
    assert sorted(file for file, _ in places) == ["test_a", "test_b", "test_c"]
    assert {worker for _, worker in places} == {"gw0", "gw1"}


def test_the_example_project_passes_where_pyluo_is_installed(
    pytester: pytest.Pytester, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(EXAMPLE, pytester.path / "project"))
    outcome = pytester.run(installed / "bin" / "python", "-m", "pytest")
    outcome.assert_outcomes(passed=1)
    outcome.stdout.fnmatch_lines(["*guests booted: 1, live updates made: 1"])
