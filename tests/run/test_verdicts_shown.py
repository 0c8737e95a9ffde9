"""Tests of what `pyluo vm selftests` prints, and when, for made-up verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.cli.vm.verdicts import show, show_json
from pyluo.vm import Kernel
from pyluo.vm.results.verdict import Outcome, Verdict, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

KERNEL = Kernel("stable", "7.3.4", Path("bzImage"))
CASES = [
    Verdict("one", Outcome.PASSED),
    Verdict("two", Outcome.FAILED, "a subtest failed", "1 is not 2\n3 is not 4"),
    Verdict("three", Outcome.SKIPPED, "no device"),
]
VERDICTS = (
    summarize("iommufd", CASES),
    Verdict("luo_kexec_simple", Outcome.PASSED),
    replace(summarize("killed", CASES[:2]), reason="killed by SIGSEGV", text="", incomplete=True),
)
LINES = (
    "ok      iommufd: one\n"
    "not ok  iommufd: two  # a subtest failed\n        1 is not 2\n        3 is not 4\n"
    "skip    iommufd: three  # no device\n",
    "ok      luo_kexec_simple\n",
    "ok      killed: one\n"
    "not ok  killed: two  # a subtest failed\n        1 is not 2\n        3 is not 4\n"
    "not ok  killed  # killed by SIGSEGV\n",
)


def test_each_verdict_is_shown_before_the_next_one_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = []

    def verdicts() -> Iterator[Verdict]:
        for verdict in VERDICTS:
            yield verdict
            shown.append(capsys.readouterr().out)

    assert not show("iommu", KERNEL, verdicts())
    assert tuple(shown) == LINES
    assert capsys.readouterr().out == ("\nFAILED: iommu on Linux 7.3.4: 3 ok, 3 not ok, 1 skip\n")


def test_a_run_without_a_verdict_is_told_as_one_that_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not show("iommu", KERNEL, iter(()))
    assert capsys.readouterr().out == "\nFAILED: iommu on Linux 7.3.4: no test ran\n"


def test_a_document_has_every_verdict_and_is_printed_after_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def verdicts() -> Iterator[Verdict]:
        for verdict in VERDICTS:
            yield verdict
            assert capsys.readouterr().out == ""

    assert not show_json("iommu", KERNEL, verdicts())
    report = json.loads(capsys.readouterr().out)
    assert [
        (each["name"], [case["name"] for case in each["subtests"]]) for each in report["verdicts"]
    ] == [
        ("iommufd", ["one", "two", "three"]),
        ("luo_kexec_simple", []),
        ("killed", ["one", "two"]),
    ]
    assert report["passed"] is False
