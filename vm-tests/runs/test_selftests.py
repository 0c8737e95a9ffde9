"""The kernel's own selftests, unmodified; and that a run of them which is not whole is noticed."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from sessions.guest_bugs import require

from pyluo.vm import VM, Death, HarnessError, Kernel
from pyluo.vm.results.ktap_reader import Outcome
from pyluo.vm.run.programs import Verdict, passed, run
from pyluo.vm.run.selftests import SUITES, Program, programs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUITE = SUITES["liveupdate"]
IOMMU = SUITES["iommu"]
COMMAND = [sys.executable, "-m", "pyluo", "vm", "selftests"]
WHOLE = "echo 1..1; echo ok 1 a"
FAILURES = ("not ok", "crash")
WITH_DMA_BUFS = re.compile(r"iommufd_ioas\.\w+\.dmabuf_\w+")


@pytest.fixture(scope="module")
def iommu_ktap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the iommu tests' command writes in KTAP."""
    return tmp_path_factory.mktemp("iommu") / "ktap"


@pytest.fixture(scope="module")
def iommu(iommu_ktap: Path) -> tuple[int, dict[str, Any]]:
    """The exit status of the iommu tests' command, and what it reported."""
    command = [*COMMAND, "iommu", "--json", "--ktap", os.fspath(iommu_ktap)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


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


def test_every_iommu_test_that_the_kernels_source_declares_has_a_verdict(
    iommu: tuple[int, dict[str, Any]], selftest_source: Callable[..., Path]
) -> None:
    expected = declared(selftest_source("selftest", "iommu"))
    assert {program for program, _ in expected} == {"iommufd", "iommufd_fail_nth"}
    assert len(expected) > 200
    told = [(each["program"], each["case"]) for each in iommu[1]["verdicts"]]
    assert sorted(told) == sorted(expected)


def test_no_iommu_test_fails_but_those_with_dma_bufs(iommu: tuple[int, dict[str, Any]]) -> None:
    failed = {each["case"] for each in iommu[1]["verdicts"] if each["outcome"] in FAILURES}
    assert {case for case in failed if not WITH_DMA_BUFS.fullmatch(case)} == set()


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="IOMMU_TEST_OP_DMABUF_GET of Linux 7.3.4 answers 0, not the descriptor",
)
def test_the_iommu_tests_with_dma_bufs_pass(iommu: tuple[int, dict[str, Any]]) -> None:
    tests = [each for each in iommu[1]["verdicts"] if WITH_DMA_BUFS.fullmatch(each["case"])]
    require(tests, "no test has dma-bufs")
    outcomes = {each["outcome"] for each in tests}
    require(outcomes <= {"ok", "not ok"}, f"{outcomes}")
    assert outcomes == {"ok"}


def test_an_iommu_test_is_skipped_only_where_its_variant_leaves_nothing_to_test(
    iommu: tuple[int, dict[str, Any]],
) -> None:
    skipped = [each for each in iommu[1]["verdicts"] if each["outcome"] == "skip"]
    assert all(".no_viommu." in each["case"] for each in skipped)
    assert {each["reason"] for each in skipped} <= {"Skipping test for variant no_viommu"}


def test_the_exit_status_says_whether_an_iommu_test_failed(
    iommu: tuple[int, dict[str, Any]],
) -> None:
    status, report = iommu
    failed = any(each["outcome"] in FAILURES for each in report["verdicts"])
    assert (status, report["passed"]) == ((1, False) if failed else (0, True))


def test_the_kernels_own_parser_counts_the_iommu_tests_as_we_do(
    iommu: tuple[int, dict[str, Any]], iommu_ktap: Path, kunit_parser: Any
) -> None:
    lines = iommu_ktap.read_text().splitlines()
    counts = kunit_parser.parse_run_tests(lines, kunit_parser.Printer(print=False)).counts
    told = Counter(each["outcome"] for each in iommu[1]["verdicts"])
    kernels = {"ok": counts.passed, "not ok": counts.failed, "skip": counts.skipped}
    assert kernels == {name: told[name] for name in kernels}
    assert counts.total() == told.total() > 200
    assert counts.errors == 0


def test_the_iommu_tests_fail_on_a_kernel_without_their_mock_device() -> None:
    done = subprocess.run(
        [*COMMAND, "iommu", "--kernel", "stable"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "FAILED: iommu on Linux" in done.stdout
    assert re.search(r"^skip .*fault injection is not enabled", done.stdout, re.MULTILINE)
    assert not re.search(r"^ok ", done.stdout, re.MULTILINE)


def test_a_warning_of_the_kernel_fails_an_iommu_test(tmp_path: Path) -> None:
    script = f"{WHOLE}; echo WARNING > /sys/kernel/debug/provoke-crash/DIRECT"
    boot = partial(VM, IOMMU.kernel, append=IOMMU.append)
    *_, whole = run([program(tmp_path, script)], boot, timeout=60)
    assert whole.crash is not None
    assert whole.crash.death is Death.WARNING
    assert "lkdtm" in whole.reason
    assert any("WARNING: " in line for line in whole.diagnostics)


def test_a_library_that_the_tests_lack_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel.find("stable")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    lacking = replace(SUITE, libraries=((os.fspath(tmp_path / "no.h"), "libno-dev"),))
    with pytest.raises(HarnessError, match="apt install libno-dev"):
        programs(lacking, kernel)


def test_how_many_results_have_come_is_shown_while_a_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = VM()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "1/3" in text and "1/3" not in self.getvalue():
                os.kill(vm.pid, signal.SIGKILL)  # this is what was waited for
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm")  # which can move the cursor
    terminal = Console(file=(screen := Screen()), force_terminal=True, force_interactive=True)
    monkeypatch.setattr("pyluo.vm.progress._console", terminal)
    *_, whole = run(
        [program(tmp_path, "echo 1..3; echo ok 1 a; sleep 1000")], lambda: vm, timeout=60
    )
    assert whole.crash is not None
    assert "program, 1 of 1" in screen.getvalue()
    assert "1/3" in screen.getvalue()


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
    boot = partial(VM, to="previous")
    (verdict,) = run([program(tmp_path, script, staged=True)], boot, timeout=60)
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
    assert "name one of liveupdate, iommu" in done.stderr


def declared(folder: Path) -> list[tuple[str, str]]:
    """The tests of a suite, by the text of its Makefile and its C sources."""
    makefile = (folder / "Makefile").read_text()
    lists = re.findall(r"^TEST_GEN_PROGS(?:_EXTENDED)? \+= (.*)$", makefile, re.MULTILINE)
    tests = []
    for name in " ".join(lists).split():
        source = (folder / f"{name}.c").read_text()
        cases = re.findall(r"^TEST_(?:F|FAIL_NTH)\((\w+), (\w+)\)", source, re.MULTILINE)
        variants = re.findall(r"^FIXTURE_VARIANT_ADD\((\w+), (\w+)\)", source, re.MULTILINE)
        tests += [
            (name, f"{fixture}.{variant}{case}")
            for fixture, case in cases
            for variant in [f"{each}." for of, each in variants if of == fixture] or [""]
        ] or [(name, "")]
    return tests


def program(folder: Path, script: str, *, name: str = "program", staged: bool = False) -> Program:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Program(path, staged)


def verdicts_of(*programs: Program, timeout: float = 60) -> list[Verdict]:
    return list(run(programs, VM, timeout=timeout))
