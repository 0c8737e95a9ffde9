"""The kernel's own selftests, unmodified; and that a run of them which is not whole is noticed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import VM, Death, HarnessError, Kernel
from pyluo.vm.ktap import Outcome
from pyluo.vm.selftests import SUITES, Program, programs
from pyluo.vm.verdicts import Verdict, passed, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUITE = SUITES["liveupdate"]
COMMAND = [sys.executable, "-m", "pyluo", "vm", "selftests"]
WHOLE = "echo 1..1; echo ok 1 a"


@pytest.mark.parametrize("name", ["stable", "previous"])
def test_every_test_that_the_kernels_source_declares_passes(
    name: str, selftest_source: Callable[[str], Path]
) -> None:
    expected = declared(selftest_source(name))
    assert len(expected) > 4
    done = subprocess.run(
        [*COMMAND, "--kernel", name, "--json"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["release"] == Kernel.find(name).release
    told = [(each["program"], each["case"], each["outcome"]) for each in report["verdicts"]]
    assert sorted(told) == sorted((*test, "ok") for test in expected)


def test_programs_that_are_in_the_cache_are_not_built_again() -> None:
    kernel = Kernel.find("stable")
    first = programs(SUITE, kernel)
    times = [program.path.stat().st_mtime_ns for program in first]
    assert programs(SUITE, kernel) == first
    assert [program.path.stat().st_mtime_ns for program in first] == times


def test_a_kernel_without_its_source_has_no_selftests() -> None:
    kernel = Kernel.find(Kernel.find("stable").image)
    with pytest.raises(HarnessError, match=r"name a kernel of kernels\.toml"):
        programs(SUITE, kernel)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 1..2; echo ok 1 a", "1 of 2 planned results came"),
        ("echo 1..2; echo ok 1 a; kill -SEGV $$", "killed by SIGSEGV"),
        (f"{WHOLE}; exit 3", "exit status 3"),
        (f"{WHOLE}; exit 4", "exit status 4"),
        ("true", "no result came"),
        ("echo ok 1 a", "no plan came"),
        ("echo 1..1; echo 'Bail out! no memory'; exit 1", "it bailed out: no memory"),
    ],
)
def test_a_program_that_does_not_do_what_it_announced_fails(
    tmp_path: Path, script: str, reason: str
) -> None:
    (*cases, whole) = verdicts_of(program(tmp_path, script))
    assert all(case.outcome is Outcome.PASSED for case in cases)
    assert whole.case == ""
    assert reason in whole.reason
    assert not passed([*cases, whole])


def test_a_case_that_fails_is_told_with_what_was_said_about_it(tmp_path: Path) -> None:
    script = "echo 1..2; echo ok 1 a; echo '# 1 is not 2'; echo not ok 2 b; exit 1"
    first, second = verdicts_of(program(tmp_path, script))
    assert first.outcome is Outcome.PASSED
    assert second == Verdict("program", "b", Outcome.FAILED, "", ("1 is not 2",))


def test_a_run_in_which_all_was_skipped_has_not_passed(tmp_path: Path) -> None:
    (verdict,) = verdicts_of(program(tmp_path, "echo '1..0 # SKIP no device'; exit 4"))
    assert (verdict.outcome, verdict.reason) == (Outcome.SKIPPED, "no device")
    assert not passed([verdict])


def test_what_a_program_said_before_it_was_given_up_on_is_kept(tmp_path: Path) -> None:
    script = "echo 1..2; echo ok 1 a; echo '# b begins'; sleep 1000"
    case, whole = verdicts_of(program(tmp_path, script), timeout=15)
    assert (case.case, case.outcome) == ("a", Outcome.PASSED)
    assert "it still ran after 15 s" in whole.reason
    assert "b begins" in whole.diagnostics


def test_a_crash_is_told_as_one_and_the_next_program_gets_a_fresh_guest(tmp_path: Path) -> None:
    crash = f"{WHOLE}; echo c > /proc/sysrq-trigger"
    *_, whole, after = verdicts = verdicts_of(
        program(tmp_path, crash, name="crashes"), program(tmp_path, WHOLE, name="works")
    )
    assert (whole.program, whole.case, whole.outcome) == ("crashes", "", Outcome.FAILED)
    assert whole.crash is not None
    assert whole.crash.death is Death.PANIC
    assert "sysrq triggered crash" in whole.reason
    assert any("Call Trace" in line for line in whole.diagnostics)
    assert (after.program, after.outcome) == ("works", Outcome.PASSED)
    assert not passed(verdicts)


def test_a_program_that_the_guest_cannot_run_is_the_harnesss_failure(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cannot run"):
        verdicts_of(Program(tmp_path / "missing", staged=False))


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        ("true", Outcome.PASSED, ""),
        ("[ $2 = 2 ]", Outcome.FAILED, "stage 1; exit status 1"),
        ("[ $2 = 1 ]", Outcome.FAILED, "stage 2; exit status 1"),
        ("[ $2 = 1 ] || { echo 'Bail out! gone'; exit 1; }", Outcome.FAILED, "stage 2; gone; exit"),
        ("echo '1..0 # SKIP no device'; exit 4", Outcome.SKIPPED, "no device"),
        ("[ $2 = 1 ] || exit 4", Outcome.FAILED, "stage 2; exit status 4"),
        ("[ $2 = 1 ] || echo c > /proc/sysrq-trigger", Outcome.FAILED, "(kernel stable, life 2)"),
    ],
)
def test_a_staged_program_passes_by_both_stages(
    tmp_path: Path, script: str, outcome: Outcome, reason: str
) -> None:
    (verdict,) = verdicts_of(program(tmp_path, script, staged=True))
    assert verdict.outcome is outcome
    assert reason in verdict.reason


def test_a_staged_program_can_jump_into_another_kernel(tmp_path: Path) -> None:
    previous = Kernel.find("previous").release
    script = f'[ "$2" = 1 ] || [ "$(uname -r)" = {previous} ]'
    (verdict,) = run([program(tmp_path, script, staged=True)], VM, to="previous", timeout=60)
    assert verdict.outcome is Outcome.PASSED


@pytest.mark.parametrize("status", [126, 127])
def test_a_program_that_ends_like_one_that_is_not_there_has_failed(
    tmp_path: Path, status: int
) -> None:
    *_, whole = verdicts_of(program(tmp_path, f"{WHOLE}; exit {status}"))
    assert whole.outcome is Outcome.FAILED
    assert f"exit status {status}" in whole.reason


def test_the_command_fails_where_the_guests_cannot_live_update() -> None:
    done = subprocess.run([*COMMAND, "--append", "liveupdate=off"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED: liveupdate on Linux" in done.stdout
    assert re.search(r"^skip +luo_kexec_simple", done.stdout, re.MULTILINE)


def test_a_suite_that_is_not_there_is_a_mistake_in_the_command() -> None:
    done = subprocess.run([*COMMAND, "no-such-suite"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "name one of liveupdate" in done.stderr


def declared(folder: Path) -> list[tuple[str, str]]:
    """The tests of a suite, by the text of its Makefile and its C sources."""
    makefile = (folder / "Makefile").read_text()
    lists = re.findall(r"^TEST_GEN_PROGS(?:_EXTENDED)? \+= (.*)$", makefile, re.MULTILINE)
    tests = []
    for name in " ".join(lists).split():
        source = (folder / f"{name}.c").read_text()
        cases = re.findall(r"^TEST_F\((\w+), (\w+)\)", source, re.MULTILINE)
        tests += [(name, f"{fixture}.{case}") for fixture, case in cases] or [(name, "")]
    return tests


def program(folder: Path, script: str, *, name: str = "program", staged: bool = False) -> Program:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Program(path, staged)


def verdicts_of(*programs: Program, timeout: float = 60) -> list[Verdict]:
    return list(run(programs, VM, timeout=timeout))
