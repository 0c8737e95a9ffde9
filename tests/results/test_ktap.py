from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo.vm.results.ktap_reader import KtapReport, KtapResult, parse
from pyluo.vm.results.verdict import Outcome

NESTED = """\
KTAP version 1
1..2
  KTAP version 1
  1..2
    KTAP version 1
    1..1
    # test_1: about to begin
    ok 1 test_1
  ok 1 example_1
  # example_2 has no subtests
  ok 2 example_2
# done with the first
ok 1 main_1
not ok 2 main_2
# Totals: pass:1 fail:1
"""


def test_subtests_belong_to_the_result_that_closes_them() -> None:
    innermost = KtapReport(
        1, (KtapResult(1, "test_1", Outcome.PASSED, "", ("test_1: about to begin",)),)
    )
    inner = KtapReport(
        2,
        (
            KtapResult(1, "example_1", Outcome.PASSED, subtests=innermost),
            KtapResult(2, "example_2", Outcome.PASSED, "", ("example_2 has no subtests",)),
        ),
    )
    assert parse(NESTED) == KtapReport(
        2,
        (
            KtapResult(1, "main_1", Outcome.PASSED, "", ("done with the first",), inner),
            KtapResult(2, "main_2", Outcome.FAILED),
        ),
        ("Totals: pass:1 fail:1",),
    )


def test_what_the_kernels_harness_writes_is_read() -> None:
    report = parse(
        "TAP version 13\n1..2\n# Starting 2 tests from 1 test cases.\n"
        "#  RUN           fixture.one ...\n#            OK  fixture.one\nok 1 fixture.one\n"
        "#  RUN           fixture.two ...\n# file.c:9:two:Expected 1 (1) == 2 (2)\n"
        "# two: Test failed\n#          FAIL  fixture.two\nnot ok 2 fixture.two\n"
        "# FAILED: 1 / 2 tests passed.\n"
    )
    assert report.faults == ()
    assert [each.name for each in report.results] == ["fixture.one", "fixture.two"]
    assert "file.c:9:two:Expected 1 (1) == 2 (2)" in report.results[1].diagnostics
    assert report.failed


@pytest.mark.parametrize(
    ("line", "name", "outcome", "reason"),
    [
        ("ok 1 - name", "name", Outcome.PASSED, ""),
        ("ok 1 name with words", "name with words", Outcome.PASSED, ""),
        ("ok 1 -", "", Outcome.PASSED, ""),
        ("ok 1", "", Outcome.PASSED, ""),
        ("ok 1 -name", "-name", Outcome.PASSED, ""),
        ("ok 1 issue #12", "issue #12", Outcome.PASSED, ""),
        ("ok 1 name # took 3 ms", "name", Outcome.PASSED, "took 3 ms"),
        ("ok 1 name # SKIP no such device", "name", Outcome.SKIPPED, "no such device"),
        ("ok 1 name #skip: not here", "name", Outcome.SKIPPED, "not here"),
        ("ok 1 name # Skip", "name", Outcome.SKIPPED, ""),
        ("ok 1 name # took 3 ms # SKIP too slow", "name # took 3 ms", Outcome.SKIPPED, "too slow"),
        ("not ok 1 queue #skip_list overflow", "queue #skip_list overflow", Outcome.FAILED, ""),
        ("not ok 1 name # skip-list overflow", "name", Outcome.FAILED, "skip-list overflow"),
        ("not ok 1 name # todos remain: 3", "name", Outcome.FAILED, "todos remain: 3"),
        ("not ok 1 name # SKIPPED none", "name", Outcome.FAILED, "SKIPPED none"),
        ("not ok 1 name # xfails: 2", "name", Outcome.FAILED, "xfails: 2"),
        ("ok 1 name # errors: 0", "name", Outcome.PASSED, "errors: 0"),
        ("ok 1 name # timeouts seen: 0", "name", Outcome.PASSED, "timeouts seen: 0"),
        ("not ok 1 name\\#TODO", "name\\#TODO", Outcome.FAILED, ""),
        ("ok 1 # SKIP name", "", Outcome.SKIPPED, "name"),
        ("ok 1 name # XFAIL known", "name", Outcome.EXPECTED_FAILURE, "known"),
        ("not ok 1 name # TODO later", "name", Outcome.EXPECTED_FAILURE, "later"),
        ("ok 1 name # TODO later", "name", Outcome.PASSED, "later"),
        ("ok 1 name # XPASS", "name", Outcome.PASSED, ""),
        ("not ok 1 name # exit=139", "name", Outcome.FAILED, "exit=139"),
        ("not ok 1 name # TIMEOUT 45 seconds", "name", Outcome.FAILED, "TIMEOUT 45 seconds"),
        ("ok 1 name # ERROR", "name", Outcome.FAILED, "ERROR"),
    ],
)
def test_a_result_line_says_name_outcome_and_reason(
    line: str, name: str, outcome: Outcome | None, reason: str
) -> None:
    assert parse(f"1..1\n{line}\r\n").results == (KtapResult(1, name, outcome, reason),)


@pytest.mark.parametrize(
    "line", ["ok", "ok then", "okay 1 x", "ok 1x", "not  ok 1 x", "1..", "1..2..3", "[ 1.0] ok 1 x"]
)
def test_what_only_looks_like_a_result_is_a_diagnostic(line: str) -> None:
    report = parse(f"1..1\n{line}\nok 1 real")
    assert report == KtapReport(1, (KtapResult(1, "real", Outcome.PASSED, "", (line,)),))


def test_console_noise_changes_no_verdict() -> None:
    noise = "[   12.345678] luo: Retrieved live update data\n\n      indented\n\ttabbed\n"
    noisy = parse(noise + NESTED.replace("\n", "\n" + noise))
    assert outline(noisy) == outline(parse(NESTED))
    assert "[   12.345678] luo: Retrieved live update data" in noisy.diagnostics


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no result came"),
        ("Segmentation fault\n", "no plan came"),
        ("ok 1 a\n", "no plan came"),
        ("1..3\nok 1 a\nok 2 b\n", "2 of 3 planned results came"),
        ("1..2\nok 1 a\nok 1 a\n", "1 of 2 planned results came"),
        ("1..1\nok 1 a\nok 2 b\n", "1 results came that were not planned"),
        ("1..1\nok 1 a\nok 1 a\n", "1 results came that were not planned"),
        ("1..2\n1..1\nok 1 a\n", "1 of 2 planned results came"),
        ("1..1\nok 1 a\nBail out! no memory\n", "it bailed out: no memory"),
        ("1..0 # SKIP\nBail out!\n", "it bailed out: no reason given"),
        ("1..0\nok 1 a\n", "1 results came that were not planned"),
        ("1..999999999\nok 1 a\n", "1 of 999999999 planned results came"),
    ],
)
def test_a_run_that_is_not_whole_fails_and_says_why(text: str, fault: str) -> None:
    report = parse(text)
    assert report.failed
    assert fault in report.faults


def test_a_plan_may_come_last() -> None:
    report = parse("ok 1 a\nok 2 b\n1..2\n")
    assert (report.planned, report.failed) == (2, False)


def test_a_plan_of_nothing_is_a_skip_with_its_reason() -> None:
    report = parse("TAP version 13\n1..0 # SKIP Failed to open the device\n")
    assert (report.skipped, report.skip_reason) == (True, "Failed to open the device")
    assert not report.failed


def test_a_subtest_that_failed_fails_its_test_even_if_that_denies_it() -> None:
    report = parse("1..1\n  1..1\n  not ok 1 inner\nok 1 outer\n")
    assert report.results[0].outcome is Outcome.PASSED
    assert report.results[0].failed
    assert report.failed


def test_a_subtest_that_is_missing_fails_its_test() -> None:
    report = parse("1..1\n  1..2\n  ok 1 inner\nok 1 outer\n")
    assert report.results[0].failed


def test_a_failure_that_was_expected_fails_nothing() -> None:
    report = parse("1..1\n  1..1\n  not ok 1 inner\nnot ok 1 outer # TODO later\n")
    assert not report.failed


def test_subtests_whose_own_test_never_reported_are_kept_and_fail() -> None:
    report = parse("1..2\nok 1 a\n  1..2\n  ok 1 inner\n")
    missing = report.results[1]
    assert (missing.number, missing.outcome, missing.failed) == (2, None, True)
    assert missing.subtests == KtapReport(2, (KtapResult(1, "inner", Outcome.PASSED),))
    assert report.faults == ("1 of 2 planned results came",)


def test_the_outermost_level_need_not_begin_at_the_margin() -> None:
    assert not parse("    1..1\n    ok 1 a\n").failed


def test_a_report_without_end_of_nesting_ends() -> None:
    text = "".join(f"{' ' * depth}1..1\n{' ' * depth}ok 1 x\n" for depth in range(2000))
    report = parse(text)
    assert report.failed
    assert repr(report)


RUNNER = """\
TAP version 13
1..2
# timeout set to 45
# selftests: net: a
# TAP version 13
# 1..2
# ok 1 inner
# # ok 2 of the inner one
# not ok 2 bad # exit=1
# # a word on it
not ok 1 selftests: net: a # exit=1
# selftests: net: b
# ok 1 only
ok 2 selftests: net: b
"""


def test_what_the_runner_of_kselftest_prefixes_are_the_results_within_its_own() -> None:
    a, b = parse(RUNNER).results
    assert a.subtests is not None
    assert [(each.name, each.outcome) for each in a.subtests.results] == [
        ("inner", Outcome.PASSED),
        ("bad", Outcome.FAILED),
    ]
    (_, bad) = a.subtests.results
    assert bad.subtests is not None
    assert [each.name for each in bad.subtests.results] == ["of the inner one"]
    assert a.subtests.diagnostics == ("a word on it",)
    assert a.subtests.results[0].diagnostics == ("timeout set to 45", "selftests: net: a")
    assert (a.failed, b.failed) == (True, False)
    assert b.subtests is not None
    assert [each.name for each in b.subtests.results] == ["only"]


def test_a_program_under_the_runner_that_ends_before_its_plan_has_failed() -> None:
    text = RUNNER.replace("# 1..2", "# 1..3").replace("not ok", "ok")
    assert parse(text).results[0].failed


def test_a_comment_that_reads_like_a_result_is_none_without_a_runner() -> None:
    report = parse("1..1\n# ok 5 items were read\nok 1 a\n")
    assert report == KtapReport(
        1, (KtapResult(1, "a", Outcome.PASSED, "", ("ok 5 items were read",)),)
    )


WORDS = """\
KTAP version 1
TAP version 13
1..2
1..0 # SKIP
1..99999999999999999999
ok 1
ok 2 - b
not ok 1 a
not ok 2
ok 1 # SKIP
ok 1 a # TODO #
ok 0
ok 3 \\# SKIP
Bail out!
Bail out! #
# said
#"""
words = st.sampled_from(WORDS.splitlines()) | st.text(max_size=20)
lines = st.tuples(st.integers(0, 40), words).map(lambda line: " " * line[0] + line[1])


@given(st.text() | st.lists(lines, max_size=80).map("\n".join))
def test_no_input_makes_it_raise_and_none_passes_without_a_result(text: str) -> None:
    report = parse(text)
    assert isinstance(report.failed, bool)
    assert report.failed or report.skipped or report.results
    assert hash(report) == hash(parse(text))


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_a_run_passes_only_if_all_that_was_planned_came_and_passed(
    oks: list[bool], data: st.DataObject
) -> None:
    results = [f"{'ok' if ok else 'not ok'} {number} t" for number, ok in enumerate(oks, 1)]
    present = data.draw(st.lists(st.sampled_from(results), unique=True))
    report = parse("\n".join([f"1..{len(oks)}", *present]))
    assert report.failed == (len(present) < len(oks) or not all(oks))


def outline(report: KtapReport | None) -> object:
    """Return a report without its diagnostics."""
    if report is None:
        return None
    results = [(each.name, each.outcome, outline(each.subtests)) for each in report.results]
    return report.planned, results
