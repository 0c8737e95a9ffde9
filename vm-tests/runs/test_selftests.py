"""Run the kernel's own selftests unmodified, and check that an incomplete run is noticed."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from sessions.guest_bugs import require

from pyluo.vm import VM, Complaint, Death, HarnessError, Kernel
from pyluo.vm.results.verdict import Outcome, Verdict, passed
from pyluo.vm.run.programs import run_program, run_selftests, run_staged
from pyluo.vm.run.selftests import SUITES, Selftest, find_selftests
from tests.json_output import read_json
from tests.snippets import ROOT, command, run_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUITE = SUITES["liveupdate"]
IOMMU = SUITES["iommu"]
COMMAND = [sys.executable, "-m", "pyluo", "vm", "selftests"]
TREE, CI = "docs/guides/kernel-tree.md", "docs/guides/ci.md"
# The command lines of the pages that run a suite, on a kernel which is there already.
SHOWN = {
    ("liveupdate", "stable"): (CI, 2),
    ("liveupdate", "previous"): (TREE, 2),
    ("iommu", "stable"): (TREE, 3),
}
FILES = {"ktap": "selftests.ktap", "junit": "selftests.xml"}
COMPLETE_RUN = "echo 1..1; echo ok 1 a"
FAILURES = ("failed", "crashed")
WITH_DMA_BUFS = re.compile(r"iommufd_ioas\.\w+\.dmabuf_\w+")


@dataclass(frozen=True)
class Report:
    """The exit status of one run of the command, and what it wrote in each format."""

    status: int
    report: dict[str, Any]
    junit: str
    ktap: str

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The tests that have no subtests."""
        return [case for program in self.report["verdicts"] for case in cases_of(program)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """A function that runs a suite once by the command, and returns its report."""

    @functools.cache
    def run_once(suite: str, kernel: str) -> Report:
        folder = tmp_path_factory.mktemp(suite)
        shown = SHOWN[suite, kernel]
        more = [f"--{name}={file}" for name, file in FILES.items() if file not in command(*shown)]
        replaced: dict[str, str | Path] = {"--kernel .": f"--kernel {kernel}"}
        if shown[0] == CI:
            replaced["venv/bin/"] = ""
        if suite == "iommu":
            replaced["~/pyluo"] = ROOT  # the fragment makes the kernel `selftest` of `stable`
        done = run_command(*shown, replaced, "--json", *more, cwd=folder, timeout=600)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        report = read_json("vm selftests", done.stdout)
        ktap, junit = ((folder / file).read_text() for file in FILES.values())
        return Report(done.returncode, report, junit, ktap)

    return run_once


@pytest.fixture
def iommu(reported: Callable[..., Report]) -> Report:
    """The report of the iommu tests."""
    return reported("iommu", "stable")


@pytest.mark.parametrize("name", ["stable", "previous"])
def test_every_test_that_the_kernels_source_declares_passes(
    name: str, reported: Callable[..., Report], selftest_source: Callable[[str], Path]
) -> None:
    expected = find_declared_tests(selftest_source(name))
    assert len(expected) > 4
    run = reported("liveupdate", name)
    assert (run.status, run.report["passed"]) == (0, True)
    assert run.report["release"] == Kernel.find(name).release
    assert list_reported_tests(run) == sorted(expected)
    assert {case["outcome"] for case in run.cases} == {"passed"}


def test_the_command_writes_one_run_as_data_as_junit_and_as_ktap(
    reported: Callable[..., Report], kunit_parser: Any
) -> None:
    run = reported("liveupdate", "stable")
    assert len(run.cases) > 4
    lines = run.ktap.splitlines()
    counts = kunit_parser.parse_run_tests(lines, kunit_parser.Printer(print=False)).counts
    assert (counts.passed, counts.total(), counts.errors) == (len(run.cases), len(run.cases), 0)
    root = ElementTree.fromstring(run.junit)
    written = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert written == [
        (f"liveupdate.{program['name']}", case["name"])
        for program in run.report["verdicts"]
        for case in cases_of(program)
    ]
    assert (root.get("tests"), root.get("failures")) == (str(len(run.cases)), "0")


def test_a_file_that_cannot_be_written_is_told_before_a_guest_boots(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "folder"
    done = subprocess.run([*COMMAND, "--junit", missing], capture_output=True, text=True)
    assert done.returncode == 69
    assert str(missing) in done.stderr
    assert done.stdout == ""


def test_every_iommu_test_that_the_kernels_source_declares_has_a_verdict(
    iommu: Report, selftest_source: Callable[..., Path]
) -> None:
    expected = find_declared_tests(selftest_source("selftest", "iommu"))
    assert {program for program, _ in expected} == {"iommufd", "iommufd_fail_nth"}
    assert len(expected) > 200
    assert list_reported_tests(iommu) == sorted(expected)


def test_no_iommu_test_fails_but_those_with_dma_bufs(iommu: Report) -> None:
    failed = {each["name"] for each in iommu.cases if each["outcome"] in FAILURES}
    assert {case for case in failed if not WITH_DMA_BUFS.fullmatch(case)} == set()


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="IOMMU_TEST_OP_DMABUF_GET of Linux 7.3.4 answers 0, not the descriptor",
)
def test_the_iommu_tests_with_dma_bufs_pass(iommu: Report) -> None:
    tests = [each for each in iommu.cases if WITH_DMA_BUFS.fullmatch(each["name"])]
    require(tests, "no test has dma-bufs")
    outcomes = {each["outcome"] for each in tests}
    require(outcomes <= {"passed", "failed"}, f"{outcomes}")
    assert outcomes == {"passed"}


def test_an_iommu_test_is_skipped_only_where_its_variant_leaves_nothing_to_test(
    iommu: Report,
) -> None:
    skipped = [each for each in iommu.cases if each["outcome"] == "skipped"]
    assert all(".no_viommu." in each["name"] for each in skipped)
    assert {each["reason"] for each in skipped} <= {"Skipping test for variant no_viommu"}


def test_the_exit_status_says_whether_an_iommu_test_failed(
    iommu: Report,
) -> None:
    failed = any(each["outcome"] in FAILURES for each in iommu.cases)
    assert (iommu.status, iommu.report["passed"]) == ((1, False) if failed else (0, True))


def test_the_kernels_own_parser_counts_the_iommu_tests_as_we_do(
    iommu: Report, kunit_parser: Any
) -> None:
    lines = iommu.ktap.splitlines()
    counts = kunit_parser.parse_run_tests(lines, kunit_parser.Printer(print=False)).counts
    outcomes = Counter(each["outcome"] for each in iommu.cases)
    kernels = {
        "passed": counts.passed,
        "failed": counts.failed,
        "skipped": counts.skipped,
    }
    assert kernels == {name: outcomes[name] for name in kernels}
    assert counts.total() == outcomes.total() > 200
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
    script = f"{COMPLETE_RUN}; echo WARNING > /sys/kernel/debug/provoke-crash/DIRECT"
    boot = partial(VM, IOMMU.kernel, append=IOMMU.append)
    (verdict,) = run_selftests([program(tmp_path, script)], boot, timeout=60)
    assert (verdict.outcome, verdict.cause) == (Outcome.CRASHED, Complaint.WARNING)
    assert "lkdtm" in verdict.reason
    assert any("WARNING: " in line for line in verdict.lines)


def test_a_library_that_the_tests_lack_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel.find("stable")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    lacking = replace(SUITE, libraries=((os.fspath(tmp_path / "no.h"), "libno-dev"),))
    with pytest.raises(HarnessError, match="apt install libno-dev"):
        find_selftests(lacking, kernel)


def test_how_many_results_have_come_is_shown_while_a_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = VM()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "1/3" in text and "1/3" not in self.getvalue():
                os.kill(vm.pid, signal.SIGKILL)  # the progress was shown, so end the run
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm")  # a terminal that can move the cursor
    terminal = Console(file=(screen := Screen()), force_terminal=True, force_interactive=True)
    monkeypatch.setattr("pyluo.vm.progress._stderr", lambda: terminal)
    (verdict,) = run_selftests(
        [program(tmp_path, "echo 1..3; echo ok 1 a; sleep 1000")], lambda: vm, timeout=60
    )
    assert verdict.cause is Death.QEMU
    assert "program, 1 of 1" in screen.getvalue()
    assert "1/3" in screen.getvalue()


def test_programs_that_are_in_the_cache_are_not_built_again() -> None:
    kernel = Kernel.find("stable")
    first = find_selftests(SUITE, kernel)
    times = [program.path.stat().st_mtime_ns for program in first]
    assert find_selftests(SUITE, kernel) == first
    assert [program.path.stat().st_mtime_ns for program in first] == times


def test_a_kernel_without_its_source_has_no_selftests() -> None:
    kernel = Kernel.find(Kernel.find("stable").image)
    with pytest.raises(HarnessError, match=r"name a kernel of kernels\.toml"):
        find_selftests(SUITE, kernel)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 1..2; echo ok 1 a", "1 of 2 planned results came"),
        ("echo 1..2; echo ok 1 a; kill -SEGV $$", "killed by SIGSEGV"),
        (f"{COMPLETE_RUN}; exit 3", "exit status 3"),
        (f"{COMPLETE_RUN}; exit 4", "exit status 4"),
        ("true", "no result came"),
        ("echo ok 1 a", "no plan came"),
        ("echo 1..1; echo 'Bail out! no memory'; exit 1", "it bailed out: no memory"),
    ],
)
def test_a_program_that_does_not_do_what_it_announced_fails(
    shared_vm: VM, tmp_path: Path, script: str, reason: str
) -> None:
    verdict = run_one(shared_vm, program(tmp_path, script))
    assert all(case.outcome is Outcome.PASSED for case in verdict.subtests)
    assert (verdict.outcome, verdict.incomplete) == (Outcome.FAILED, True)
    assert reason in verdict.reason
    assert not passed([verdict])


def test_a_case_that_fails_is_told_with_what_was_said_about_it(
    shared_vm: VM, tmp_path: Path
) -> None:
    script = "echo 1..2; echo ok 1 a; echo '# 1 is not 2'; echo not ok 2 b; exit 1"
    verdict = run_one(shared_vm, program(tmp_path, script))
    first, second = verdict.subtests
    assert first.outcome is Outcome.PASSED
    assert second == Verdict("b", Outcome.FAILED, "", "1 is not 2")
    assert (verdict.outcome, verdict.incomplete) == (Outcome.FAILED, False)


def test_a_run_in_which_all_was_skipped_has_not_passed(shared_vm: VM, tmp_path: Path) -> None:
    verdict = run_one(shared_vm, program(tmp_path, "echo '1..0 # SKIP no device'; exit 4"))
    assert (verdict.outcome, verdict.reason) == (Outcome.SKIPPED, "no device")
    assert not passed([verdict])


def test_what_a_program_said_before_it_was_given_up_on_is_kept(
    shared_vm: VM, tmp_path: Path
) -> None:
    script = "echo 1..2; echo ok 1 a; echo '# b begins'; sleep 1000"
    verdict = run_one(shared_vm, program(tmp_path, script), timeout=5)
    (case,) = verdict.subtests
    assert (case.name, case.outcome) == ("a", Outcome.PASSED)
    assert "it still ran after 5 s" in verdict.reason
    assert "b begins" in verdict.lines


def test_a_crash_is_told_as_one_and_the_next_program_gets_a_fresh_guest(tmp_path: Path) -> None:
    crash = f"{COMPLETE_RUN}; echo c > /proc/sysrq-trigger"
    selftests = [
        program(tmp_path, crash, name="crashes"),
        program(tmp_path, COMPLETE_RUN, name="works"),
    ]
    crashed, after = verdicts = list(run_selftests(selftests, VM, timeout=60))
    assert (crashed.name, crashed.outcome) == ("crashes", Outcome.CRASHED)
    assert crashed.cause is Complaint.PANIC
    assert "sysrq triggered crash" in crashed.reason
    assert any("Call Trace" in line for line in crashed.lines)
    assert (after.name, after.outcome) == ("works", Outcome.PASSED)
    assert not passed(verdicts)


def test_a_program_that_the_guest_cannot_run_is_the_harnesss_failure(
    shared_vm: VM, tmp_path: Path
) -> None:
    with pytest.raises(HarnessError, match="cannot run"):
        run_program(shared_vm, [tmp_path / "missing"], 60)


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        ("true", Outcome.PASSED, ""),
        ("[ $2 = 2 ]", Outcome.FAILED, "stage 1; exit status 1"),
        ("[ $2 = 1 ]", Outcome.FAILED, "stage 2; exit status 1"),
        ("[ $2 = 1 ] || { echo 'Bail out! gone'; exit 1; }", Outcome.FAILED, "stage 2; gone; exit"),
        ("echo '1..0 # SKIP no device'; exit 4", Outcome.SKIPPED, "no device"),
        ("[ $2 = 1 ] || exit 4", Outcome.FAILED, "stage 2; exit status 4"),
        (
            "[ $2 = 1 ] || echo c > /proc/sysrq-trigger",
            Outcome.CRASHED,
            "(kernel stable, life {life})",
        ),
    ],
)
def test_a_staged_program_passes_by_both_stages(
    vm: VM, tmp_path: Path, script: str, outcome: Outcome, reason: str
) -> None:
    life = vm.life.number + 1
    verdict = run_staged(vm, program(tmp_path, script, staged=True), 60)
    assert verdict.outcome is outcome
    assert reason.format(life=life) in verdict.reason


def test_a_staged_program_can_jump_into_another_kernel(tmp_path: Path) -> None:
    previous = Kernel.find("previous").release
    script = f'[ "$2" = 1 ] || [ "$(uname -r)" = {previous} ]'
    boot = partial(VM, to="previous")
    (verdict,) = run_selftests([program(tmp_path, script, staged=True)], boot, timeout=60)
    assert verdict.outcome is Outcome.PASSED


@pytest.mark.parametrize("status", [126, 127])
def test_a_program_that_ends_like_one_that_is_not_there_has_failed(
    shared_vm: VM, tmp_path: Path, status: int
) -> None:
    verdict = run_one(shared_vm, program(tmp_path, f"{COMPLETE_RUN}; exit {status}"))
    assert verdict.outcome is Outcome.FAILED
    assert f"exit status {status}" in verdict.reason


def test_the_command_fails_where_the_guests_cannot_live_update() -> None:
    done = subprocess.run([*COMMAND, "--append", "liveupdate=off"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED: liveupdate on Linux" in done.stdout
    assert re.search(r"^skip +luo_kexec_simple", done.stdout, re.MULTILINE)


def test_a_suite_that_is_not_there_is_a_mistake_in_the_command() -> None:
    done = subprocess.run([*COMMAND, "no-such-suite"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "name one of liveupdate, iommu" in done.stderr


def find_declared_tests(folder: Path) -> list[tuple[str, str]]:
    """Find the tests of a suite in its Makefile and its C sources."""
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


def list_reported_tests(run: Report) -> list[tuple[str, str]]:
    """Return the programs and cases that a run reported, sorted."""
    return sorted(
        (program["name"], "" if case is program else case["name"])
        for program in run.report["verdicts"]
        for case in cases_of(program)
    )


def cases_of(program: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of a program, and the program itself if there is more to say of it."""
    alone = not program["subtests"] or program["incomplete"]
    return [*program["subtests"], *([program] if alone else [])]


def program(folder: Path, script: str, *, name: str = "program", staged: bool = False) -> Selftest:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Selftest(path, staged)


def run_one(vm: VM, selftest: Selftest, timeout: float = 60) -> Verdict:
    verdict, _ = run_program(vm, [selftest.path], timeout)
    return verdict
