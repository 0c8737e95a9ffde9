"""`pyluo doctor` on this machine, and with things taken away from it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm import HarnessError
from pyluo.vm.machine.qemu import find_binary
from tests.json_output import read_json
from tests.snippets import run_command

if TYPE_CHECKING:
    from pathlib import Path


def doctor(*words: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run the command; return its status, and its checks by their subjects."""
    shown = {"venv/bin/": "", "harness": " ".join(words)}
    environment = {"PYLUO_ACCEL": "tcg"} | environment
    done = run_command("docs/guides/ci.md", 1, shown, "--json", env=environment)
    assert not done.stderr
    parts = read_json("doctor", done.stdout)
    return done.returncode, {each["subject"]: each for part in parts.values() for each in part}


def tools_without(folder: Path, *left_out: str) -> str:
    """Return a PATH with all programs of this machine but these."""
    for place in os.environ["PATH"].split(os.pathsep):
        for name in os.listdir(place) if os.path.isdir(place) else ():
            link = folder / name
            if name not in left_out and not link.is_symlink():
                link.symlink_to(os.path.join(place, name))
    return os.fspath(folder)


def test_a_machine_that_runs_the_harness_is_found_able_to() -> None:
    try:
        find_binary()
    except HarnessError:
        pytest.skip("this machine has no QEMU, which `make check` does without")
    status, checks = doctor("harness")
    assert status == 0
    assert [each for each in checks.values() if each["verdict"] == "missing"] == []
    assert checks["accelerator"]["found"] == "tcg (PYLUO_ACCEL)"
    # One half of the questions is enough, if nobody has asked for the other.
    assert doctor()[0] == 0


def test_tools_that_are_missing_are_named_by_their_packages(tmp_path: Path) -> None:
    path = tools_without(tmp_path, "flex", "xz", "qemu-system-x86_64")
    status, checks = doctor("harness", PATH=path)
    assert status == 1
    assert checks["building kernels"]["found"] == "flex xz-utils: missing"
    assert "flex xz-utils" in checks["building kernels"]["remedy"]
    assert checks["QEMU"]["verdict"] == "missing"


def test_a_cache_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, checks = doctor("harness", XDG_CACHE_HOME=os.fspath(tmp_path / "file"))
    assert status == 1
    assert "cannot be created" in checks["cache"]["found"]


def test_every_check_that_is_not_ready_says_what_to_do(tmp_path: Path) -> None:
    for environment in ({}, {"PATH": tools_without(tmp_path, "flex", "qemu-system-x86_64")}):
        _, checks = doctor(**environment)
        assert len(checks) > 10
        for check in checks.values():
            assert check["found"]
            assert check["verdict"] == "ready" or check["remedy"], check
