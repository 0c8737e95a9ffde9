"""Tests of turning the KTAP of a guest's programs into subtests, JUnit and KTAP.

The written KTAP is checked by the kernel's own parser, from the source of the kernel under test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo.vm import Complaint, HarnessError
from pyluo.vm.results import junit, ktap_reader, ktap_writer
from pyluo.vm.results.verdict import Outcome, Verdict, summarize
from pyluo.vm.run.programs import run_program

if TYPE_CHECKING:
    from pathlib import Path

    from pyluo.vm import VM


NESTED = """\
KTAP version 1
1..3
  KTAP version 1
  # Subtest: outer
  1..3
    KTAP version 1
    1..1
    # deep: begins
    ok 1 deep
  ok 1 middle
  # file.c:9: 1 is not 2
  not ok 2 bad # exit=1
  ok 3 absent # SKIP no device
not ok 1 outer
ok 2 known # XFAIL not yet
not ok 3 later # TODO some day
"""
WHOLE = NESTED.replace("not ok 2 bad # exit=1", "ok 2 bad").replace("not ok 1", "ok 1")

Parser = Any  # a module of the kernel's tree


def parse(kunit_parser: Parser, document: str) -> Any:
    """Parse a document with the kernel's parser."""
    return kunit_parser.parse_run_tests(document.splitlines(), kunit_parser.Printer(print=False))


def count(kunit_parser: Parser, document: str) -> dict[str, int]:
    """Return the counts of the kernel's parser that are not 0."""
    return {
        name: number
        for name, number in vars(parse(kunit_parser, document).counts).items()
        if number
    }


def run(vm: VM, folder: Path, text: str, end: str = "") -> Verdict:
    verdict, _ = run_program(vm, [program(folder, text, end)], 30)
    return verdict


def program(folder: Path, text: str, end: str = "") -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n{end}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        (WHOLE, "", {"passed": 4, "skipped": 1}),
        (NESTED, "exit 1", {"passed": 3, "failed": 1, "skipped": 1}),
        ("1..2\nok 1 a\nnot ok 2 b\n", "exit 1", {"passed": 1, "failed": 1}),
        ("1..1\nnot ok 1 a # TODO x\n", "", {"passed": 1}),
        ("1..0 # SKIP no device\n", "exit 4", {"skipped": 1}),
        # A fault of the program as a whole is counted as one more failed test.
        ("1..3\nok 1 a\n", "", {"passed": 1, "failed": 1}),
        ("1..1\nok 1 a\n", "exit 3", {"passed": 1, "failed": 1}),
        ("1..1\nok 1 a\n", "kill -SEGV $$", {"passed": 1, "failed": 1}),
        ("1..2\nok 1 a\n  1..2\n  ok 1 within\n", "", {"passed": 2, "failed": 1}),
        ("1..1\nBail out! no memory\n", "exit 1", {"failed": 1}),
    ],
)
def test_the_kernels_parser_takes_what_is_written_for_what_the_program_said(
    shared_vm: VM,
    tmp_path: Path,
    kunit_parser: Parser,
    text: str,
    end: str,
    expected: dict[str, int],
) -> None:
    document = ktap_writer.write([run(shared_vm, tmp_path, text, end)])
    assert count(kunit_parser, document) == expected, document


def test_to_the_kernels_parser_a_test_that_took_the_guest_with_it_crashed(
    vm: VM, tmp_path: Path, kunit_parser: Parser
) -> None:
    text = "1..3\n  1..2\n  ok 1 within\nok 1 a\n  1..2\n  ok 1 first\n"
    verdict = run(vm, tmp_path, text, "echo c > /proc/sysrq-trigger")
    assert (verdict.outcome, verdict.cause) == (Outcome.CRASHED, Complaint.PANIC)
    document = ktap_writer.write([verdict])
    main = parse(kunit_parser, document)
    assert (main.status, main.counts.crashed, main.counts.errors) == (
        kunit_parser.TestStatus.TEST_CRASHED,
        1,
        1,
    )
    assert "sysrq triggered crash" in document
    errors = ElementTree.fromstring(junit.write("suite", [verdict])).findall(".//error")
    assert ["sysrq triggered crash" in each.get("message", "") for each in errors] == [True]


def test_a_death_is_a_crash_though_a_subtest_has_the_programs_name(kunit_parser: Parser) -> None:
    verdict = Verdict(
        "p", Outcome.CRASHED, "kernel warning: x", "console", Complaint.WARNING, incomplete=True,
        subtests=(Verdict("p", Outcome.PASSED),),
    )  # fmt: skip
    counts = count(kunit_parser, ktap_writer.write([verdict]))
    assert counts == {"passed": 1, "crashed": 1, "errors": 1}


BLOCKS = """\
#!{python}
import os, sys
print("1..400")
for number in range(1, 401):
    print(f"ok {{number}} case {{number}}")  # into a buffer of some kilobytes
    if number % 50 == 0:
        os.write(2, b"a word on the way\\n")
"""


def test_a_program_that_does_not_flush_its_output_loses_no_result(
    shared_vm: VM, tmp_path: Path
) -> None:
    path = tmp_path / "program"
    path.write_text(BLOCKS.format(python=sys.executable))
    path.chmod(0o755)
    verdict, _ = run_program(shared_vm, [path], 30)
    assert (verdict.outcome, verdict.reason) == (Outcome.PASSED, "")
    assert [each.name for each in verdict.subtests] == [f"case {n}" for n in range(1, 401)]


def test_what_a_failed_program_wrote_to_stderr_is_told(shared_vm: VM, tmp_path: Path) -> None:
    verdict = run(shared_vm, tmp_path, "1..2\nok 1 a\n", "echo no memory >&2; exit 3")
    assert (verdict.outcome, verdict.lines) == (Outcome.FAILED, ["no memory"])


def test_a_program_is_looked_up_where_it_runs(
    shared_vm: VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "1..1\nok 1 a\n").rename(tmp_path / "only-here")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HarnessError, match="no such program in the guest's PATH"):
        run_program(shared_vm, ["only-here"], 30)
    monkeypatch.setenv("PATH", "/nowhere")
    verdict, _ = run_program(shared_vm, ["sh", "-c", "echo 1..1; echo ok 1 a; exit 127"], 30)
    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "exit status 127")
    (tmp_path / "only-here").write_text("#!/no/such/interpreter\n")
    with pytest.raises(HarnessError, match=r"interpreter|not found"):
        run_program(shared_vm, [tmp_path / "only-here"], 30)


def test_diagnostics_come_before_the_line_that_they_belong_to(
    shared_vm: VM, tmp_path: Path, kunit_parser: Parser
) -> None:
    document = ktap_writer.write([run(shared_vm, tmp_path, NESTED, "exit 1")])
    (of_program,) = parse(kunit_parser, document).subtests
    bad = of_program.subtests[0].subtests[1]
    assert bad.name == "bad"
    assert "    # file.c:9: 1 is not 2" in bad.log


def test_what_would_mislead_the_kernels_parser_in_a_name_or_a_message_does_not(
    kunit_parser: Parser,
) -> None:
    misleading = (
        "Subtest: another", "Kernel panic - not syncing: VFS: no root", "reboot: System halted",
        "1..5", "ok 1 not a result", "two\nlines", "KTAP version 1",
    )  # fmt: skip
    lines = "\n".join(misleading)
    cases = [Verdict(text, Outcome.FAILED, text, lines) for text in misleading]
    cases += [Verdict("issue #12", Outcome.PASSED, "SKIP nothing", lines)]
    verdicts = [
        summarize("p", cases),
        summarize("q", [Verdict("q", Outcome.PASSED, "", lines)]),
        Verdict("r", Outcome.FAILED, "Kernel panic - not syncing: VFS: no root", lines),
    ]
    document = ktap_writer.write(verdicts)
    assert count(kunit_parser, document) == {"failed": len(misleading) + 1, "passed": 2}, document


words = st.text(max_size=12) | st.sampled_from(["a", "a # SKIP", "- a", "1..2", "ok 1 a", ": b"])
leaves = st.builds(
    Verdict,
    words.filter(bool),
    st.sampled_from([Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED, Outcome.EXPECTED_FAILURE]),
    words,
    st.lists(words, max_size=2).map("\n".join),
)


def nested(inner: st.SearchStrategy[Verdict]) -> st.SearchStrategy[Verdict]:
    """Draw tests that have subtests, and that failed if one of these did."""
    return st.builds(
        lambda name, subtests, lines: Verdict(
            name,
            Outcome.FAILED if any(each.bad for each in subtests) else Outcome.PASSED,
            "",
            "\n".join(lines),
            subtests=tuple(subtests),
        ),
        words.filter(bool),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(words, max_size=2),
    )


trees = st.lists(st.recursive(leaves, nested, max_leaves=8), min_size=1, max_size=4).map(
    lambda cases: summarize("program", cases)
)


@given(trees)
def test_the_kernels_parser_and_junits_document_and_our_own_parser_count_alike(
    kunit_parser: Parser, program: Verdict
) -> None:
    tests = list(program.leaves())
    outcomes = [test.outcome for test in tests]
    skipped, failed = outcomes.count(Outcome.SKIPPED), outcomes.count(Outcome.FAILED)
    expected_failures = outcomes.count(Outcome.EXPECTED_FAILURE)
    passed = len(tests) - skipped - failed
    document = ktap_writer.write([program])
    kernels = count(kunit_parser, document)
    numbers = {"passed": passed, "failed": failed, "skipped": skipped}
    assert kernels == {name: number for name, number in numbers.items() if number}
    report = ktap_reader.parse(document)
    assert report.faults == ()
    assert report.failed == bool(failed)
    root = ElementTree.fromstring(junit.write("suite", [program]))
    assert {name: root.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": str(len(tests)),
        "failures": str(failed),
        "errors": "0",
        "skipped": str(skipped + expected_failures),
    }


PROGRAMS = {
    "reports": (NESTED, "exit 1"),
    "stops_early": ("1..3\nok 1 a\n", ""),
    "ends_badly": ("1..1\nok 1 a\n", "exit 3"),
    "skips_each": ("1..1\nok 1 a # SKIP no device\n", ""),
    "skips_all": ("1..0 # SKIP no device\n", "exit 4"),
    # The last one, because no guest is left after it.
    "takes_the_guest_along": ("1..1\nok 1 a\n", "echo c > /proc/sysrq-trigger"),
}
TEST = """\
import pytest
from pyluo.vm import VM

@pytest.fixture(scope="module")
def guest():
    with VM() as vm:
        yield vm
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    """The JUnit test cases, by name, of a pytest run of all the programs in one guest."""
    folder = tmp_path_factory.mktemp("programs")
    test = TEST
    for name, (text, end) in PROGRAMS.items():
        path = program(folder, text, end).rename(folder / name)
        test += f"\ndef test_{name}(guest, ktap):\n    ktap(guest, [{str(path)!r}])\n"
    (folder / "test_it.py").write_text(test)
    subprocess.run(
        [sys.executable, "-m", "pytest", "--junitxml=junit.xml", "--pyluo-junit-subtests"],
        cwd=folder,
        capture_output=True,
    )
    (suite,) = ElementTree.parse(folder / "junit.xml").getroot()
    found = suite.findall("testcase")
    assert suite.get("tests") == str(len(found))
    return {(case.get("name") or "").removeprefix("test_"): case for case in found}


def test_each_case_of_a_program_is_a_subtest_with_a_case_of_its_own_in_junits_document(
    cases: dict[str, ElementTree.Element],
) -> None:
    tags = {
        name: [child.tag for child in case]
        for name, case in cases.items()
        if name.startswith("reports")
    }
    assert tags == {
        "reports": ["failure"],
        "reports[outer / middle / deep]": [],
        "reports[outer / bad]": ["failure"],
        "reports[outer / absent]": ["skipped"],
        "reports[known]": ["skipped"],
        "reports[later]": ["skipped"],
    }
    (failure,) = cases["reports[outer / bad]"]
    assert "file.c:9: 1 is not 2" in (failure.text or "")


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("stops_early", "failure", "1 of 3 planned results came"),
        ("ends_badly", "failure", "exit status 3"),
        ("skips_each", "skipped", "skipped all its cases"),
        ("skips_all", "skipped", "no device"),
        ("takes_the_guest_along", "failure", "GuestCrash"),
    ],
)
def test_a_program_that_did_not_do_what_it_announced_is_no_passed_test(
    cases: dict[str, ElementTree.Element], name: str, tag: str, message: str
) -> None:
    (child,) = cases[name]
    assert child.tag == tag
    assert message in child.get("message", "")
    assert (f"{name}[a]" in cases) == (name != "skips_all")
