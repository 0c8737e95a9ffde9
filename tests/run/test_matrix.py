"""Tests of routes, cells and the page of a matrix, from made-up runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pyluo.cli import main
from pyluo.vm import Complaint, Death, Event, Kernel, Timeline
from pyluo.vm.machine.timeline import (
    LOADED,
    NEW_KERNEL,
    REBOOT_CALLED,
    WORKER_UP,
    GuestLog,
    Jump,
    VmEvent,
)
from pyluo.vm.results import junit, ktap_reader, ktap_writer
from pyluo.vm.results.cell import Cell, Direction, Route
from pyluo.vm.results.page import render
from pyluo.vm.results.pytest_run import NOT_RUN, PytestRun
from pyluo.vm.results.verdict import Outcome, Verdict
from pyluo.vm.run.matrix import routes

OLD, NEW = Kernel("old", "7.2.13", Path("old")), Kernel("new", "7.3.4", Path("new"))
LANDED = Timeline(
    100.0,
    (Event(LOADED, 100.5), Event(REBOOT_CALLED, 101.0), Event(NEW_KERNEL, 101.5),
     Event(WORKER_UP, 103.5), Event("mine", 103.75), Event("mine", 104.0)),
)  # fmt: skip
NOT_LANDED = Timeline(200.0, (Event(LOADED, 200.25), Event(REBOOT_CALLED, 200.5)))
GUEST = GuestLog(
    "old",
    (Jump("old", "new", True, LANDED), Jump("new", "old", False, NOT_LANDED)),
    "<b>console</b> & all",
)
PASSED = Verdict("test_a.py::test_<one>", Outcome.PASSED, seconds=4.0, guests=(GUEST,))
CRASHED = Verdict(
    "test_a.py::test_two",
    Outcome.CRASHED,
    "panic: <why>",
    "all\nof it",
    Complaint.PANIC,
    guests=(GUEST,),
)


def run(*records: Verdict, status: int = 0, output: str = "") -> PytestRun:
    return PytestRun(records, status, output)


@pytest.mark.parametrize(
    ("before", "after", "direction"),
    [
        ("7.2.13", "7.3.4", Direction.UPGRADE),
        ("7.3.4", "7.2.13", Direction.ROLLBACK),
        ("7.3.4", "7.3.4", Direction.SAME),
        ("7.9.1", "7.10", Direction.UPGRADE),
        ("7.3.0-rc2", "7.3.0-rc10", Direction.UPGRADE),
        ("7.3.0-rc7", "7.3.0", Direction.UPGRADE),
        ("7.3.0", "7.3.0-rc7+", Direction.ROLLBACK),
    ],
)
def test_a_route_goes_up_or_down_by_the_releases(
    before: str, after: str, direction: Direction
) -> None:
    route = Route(Kernel("a", before, Path("a")), Kernel("b", after, Path("b")), 1)
    assert route.direction is direction


def test_every_pair_is_tried_with_each_number_of_hops() -> None:
    assert [str(route) for route in routes([OLD, NEW], [NEW], [1, 3])] == [
        "old to new, one hop", "old to new, 3 hops", "new to new, one hop", "new to new, 3 hops",
    ]  # fmt: skip


SKIPPED = Verdict("t", Outcome.SKIPPED, reason="no device")
EXPECTED = Verdict("t", Outcome.EXPECTED_FAILURE, reason="known")
ERROR = Verdict("t", Outcome.NO_VERDICT, reason="HarnessError: no QEMU")
FAILED = Verdict("t", Outcome.FAILED, reason="assert 0")


@pytest.mark.parametrize(
    ("ended", "outcome", "reason"),
    [
        (run(PASSED), Outcome.PASSED, ""),
        (run(PASSED, EXPECTED, SKIPPED), Outcome.PASSED, ""),
        (run(EXPECTED, SKIPPED), Outcome.NO_VERDICT, "no test passed"),
        (run(PASSED, status=1), Outcome.NO_VERDICT, "pytest failed, and no test tells why"),
        (run(PASSED, FAILED, status=1), Outcome.FAILED, "t: assert 0"),
        (run(PASSED, CRASHED, status=1), Outcome.FAILED, "test_a.py::test_two: panic: <why>"),
        (run(FAILED, status=-9), Outcome.FAILED, "t: assert 0"),
        (run(PASSED, ERROR, status=1), Outcome.NO_VERDICT, "t: HarnessError: no QEMU"),
        (run(PASSED, status=3), Outcome.NO_VERDICT, "pytest ended with status 3"),
        (run(PASSED, status=-9), Outcome.NO_VERDICT, "pytest ended with status -9"),
        (run(SKIPPED), Outcome.NO_VERDICT, "no test passed"),
        (run(status=5), Outcome.NO_VERDICT, "no test ran"),
        (run(), Outcome.NO_VERDICT, "no test ran"),
    ],
)
def test_what_a_run_says_of_its_kernels(ended: PytestRun, outcome: Outcome, reason: str) -> None:
    assert (ended.outcome, ended.reason) == (outcome, reason)


def test_a_cell_that_did_not_pass_has_a_verdict_that_says_so() -> None:
    route = Route(OLD, NEW, 3)
    for ended in (run(status=5), run(SKIPPED), run(PASSED, status=3), run(ERROR, status=1)):
        verdict = Cell(route, ended).verdict()
        assert (verdict.name, verdict.bad) == ("old to new, 3 hops", True)
        assert [leaf.bad for leaf in verdict.leaves()].count(True) == 1
    crash = Cell(route, run(CRASHED, status=1)).verdict()
    assert (crash.outcome, crash.cause) == (Outcome.CRASHED, Complaint.PANIC)
    assert [leaf.name for leaf in crash.leaves()] == ["test_a.py::test_two"]
    passed = Cell(route, run(PASSED, SKIPPED, EXPECTED)).verdict()
    assert passed.outcome is Outcome.PASSED
    assert [leaf.outcome for leaf in passed.leaves()] == [
        Outcome.PASSED, Outcome.SKIPPED, Outcome.EXPECTED_FAILURE,
    ]  # fmt: skip


CASES = (
    Verdict("mmap", Outcome.PASSED),
    Verdict("seals", Outcome.FAILED, "not ok", "file.c:9"),
    Verdict("vfio", Outcome.SKIPPED, "no device"),
)


@pytest.mark.parametrize(
    ("ended", "cases"),
    [
        (run(PASSED), {PASSED.name: ("", "")}),
        (run(FAILED), {"t": ("failure", "")}),
        (run(CRASHED), {CRASHED.name: ("error", "kernel panic")}),
        (run(ERROR), {"t": ("error", "no verdict")}),
        (run(SKIPPED), {"t": ("skipped", "skip"), "": ("error", "no verdict")}),
        (NOT_RUN, {"": ("error", "no verdict")}),
        (
            run(Verdict("t", Outcome.FAILED, reason="seals: not ok", subtests=CASES)),
            {
                "t / mmap": ("", ""),
                "t / seals": ("failure", ""),
                "t / vfio": ("skipped", "skip"),
            },
        ),
        (
            run(Verdict("t", Outcome.CRASHED, cause=Complaint.OOPS, subtests=CASES[:2])),
            {"t / mmap": ("", ""), "t / seals": ("failure", ""), "t": ("error", "kernel oops")},
        ),
        (
            run(
                Verdict(
                    "t",
                    Outcome.CRASHED,
                    cause=Complaint.OOPS,
                    subtests=(Verdict("mmap", Outcome.CRASHED, cause=Complaint.OOPS),),
                )
            ),
            {"t / mmap": ("error", "kernel oops")},
        ),
        (
            run(Verdict("t", Outcome.NO_VERDICT, cause=Death.QEMU, subtests=CASES[1:2])),
            {"t / seals": ("failure", ""), "t": ("error", "no verdict")},
        ),
    ],
)
def test_junit_tells_a_failure_from_a_death_and_from_no_verdict(
    ended: PytestRun, cases: dict[str, tuple[str, str]]
) -> None:
    route = Route(OLD, NEW, 3)
    document = junit.write("matrix", [Cell(route, ended).verdict()])
    results = {}
    for case in ElementTree.fromstring(document).iter("testcase"):
        name = case.attrib["name"].removeprefix(str(route))
        results[name] = next(((child.tag, child.get("type", "")) for child in case), ("", ""))
    assert results == cases


@pytest.mark.parametrize("dies", [True, False])
def test_in_ktap_the_subtests_are_below_their_test_and_a_death_is_one_result_that_is_missing(
    dies: bool,
) -> None:
    cases = (*CASES[:1], Verdict("dma", Outcome.CRASHED, "panic", cause=Complaint.PANIC))
    record = Verdict(
        "t", Outcome.CRASHED, cause=Complaint.PANIC, subtests=cases if dies else CASES[:2]
    )
    (cell,) = ktap_reader.parse(
        ktap_writer.write([Cell(Route(OLD, NEW, 3), run(record)).verdict()])
    ).results
    assert cell.subtests is not None
    (test,) = cell.subtests.results
    assert (test.name, test.failed) == ("t", True)
    assert test.subtests is not None
    assert [case.name for case in test.subtests.results] == ["mmap", "dma" if dies else "seals"]
    inner = test.subtests.results[1].subtests
    assert (test.subtests.planned, inner and inner.planned) == ((2, 1) if dies else (3, None))


def test_the_blackout_of_a_cell_is_that_of_what_landed() -> None:
    assert Cell(Route(OLD, NEW, 1), run(PASSED)).blackout == 2.5
    assert Cell(Route(OLD, NEW, 1), run(SKIPPED)).blackout is None


class _Page(HTMLParser):
    """The elements of a page, and its references to other places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.folded = 0
        self.data: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags[tag] += 1
        self.classes.update((attributes.get("class") or "").split())
        self.references += [
            attributes[name] or "" for name in ("src", "href") if name in attributes
        ]
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        self.folded += tag == "details" and "open" not in attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def test_the_page_has_every_cell_jump_and_log_and_needs_no_other_file() -> None:
    cells = [
        Cell(route, run(CRASHED, status=1, output="output") if route.hops == 3 else run(PASSED))
        for route in routes([OLD, NEW], [OLD, NEW], [1, 3])
    ]
    text = render(cells)
    page = _Page(text)
    assert page.open == []
    assert page.tags["section"] == 8
    assert page.classes["bar"] == 16
    assert page.tags["td"] == 3 * 2 + 4 * 3  # 3 for each kernel; in each row, the hops and 2 cells
    assert page.classes["lost"] == 8
    # Both jumps load and leave, but only one lands; the legend has one of each too.
    assert {style: page.classes[style] for style in ("load", "leave", "jump", "boot")} == {
        "load": 17, "leave": 17, "jump": 9, "boot": 9,
    }  # fmt: skip
    assert page.classes["restore"] == 9
    assert page.folded == 16  # the consoles and the logs; failures are unfolded
    assert page.references == [f"#{number}" for number in (0, 2, 1, 3, 4, 6, 5, 7)]
    assert sorted(page.ids) == [str(number) for number in range(8)]
    assert "script" not in page.tags
    assert "url(" not in text
    assert "@import" not in text
    text_of_page = "".join(page.data)
    for words in ("<b>console</b> & all", "panic: <why>", "test_<one>", "blackout 2.50 s"):
        assert words in text_of_page
    assert "b" not in page.tags


def test_the_page_lists_the_subtests_below_their_test() -> None:
    record = Verdict("t", Outcome.FAILED, reason="seals: not ok", subtests=CASES)
    text = render([Cell(Route(OLD, NEW, 1), run(record))])
    page = _Page(text)
    assert (page.open, page.tags["li"]) == ([], 3)
    assert '<li><span class="skipped">skipped</span> vfio: no device</li>' in text


def test_a_timeline_is_drawn_in_proportion() -> None:
    page = render([Cell(Route(OLD, NEW, 1), run(PASSED))])
    first, second = re.findall(r'<div class="bar">(.*?)</div>', page)
    bars = {
        style: float(width)
        for style, width in re.findall(r'<i class="(\w+)" style="width: ([\d.]+)%"', first)
    }
    whole = 100 / 3.75  # the longest timeline of a page takes the whole width
    assert bars == {
        "load": pytest.approx(0.5 * whole, abs=0.01),
        "leave": pytest.approx(0.5 * whole, abs=0.01),
        "jump": pytest.approx(0.5 * whole, abs=0.01),
        "boot": pytest.approx(2.0 * whole, abs=0.01),
        "restore": pytest.approx(0.25 * whole, abs=0.01),
    }
    assert len(re.findall("<i ", second)) == 2
    # In words as well, for who has no mouse or does not see colours.
    assert "booting the new kernel 2.00 s" in page


def test_the_gap_of_each_vm_is_below_its_live_update() -> None:
    events = (
        VmEvent("vm0", "paused", 98.75, clock=5_000_000_000, counter=40),
        VmEvent("vm0", "resumed", 105.0, clock=9_000_000_000, counter=41),
        VmEvent("vm1", "paused", 99.5, counter=7),
        VmEvent("vm1", "resumed", 104.5, counter=6),
    )
    jump = Jump("old", "new", True, Timeline(LANDED.started, LANDED.events, events))
    log = GuestLog("old", (jump,), "")
    page = render([Cell(Route(OLD, NEW, 1), run(Verdict("t", Outcome.FAILED, guests=(log,))))])
    update, one, two = re.findall(r'<div class="bar"><span style="width: ([\d.]+)%"></span>', page)
    whole = 100 / 6.25  # from the first pause to the last resumption
    assert (float(update), float(one), float(two)) == pytest.approx((1.25 * whole, 0, 0.75 * whole))
    widths = [float(width) for width in re.findall(r'class="vm" style="width: ([\d.]+)%"', page)]
    assert widths == pytest.approx([6.25 * whole, 5.0 * whole])
    assert "vm0: 6.25 s; its own clock: 4.000 s; its counter: +1" in page
    assert "paused -1.25 s · resumed +5.00 s" in page
    assert "the counter of the VM vm1 went back: 7 when it was paused, 6 when it was" in page


def test_what_cannot_be_drawn_in_proportion_is_shown_all_the_same() -> None:
    for timeline in (
        Timeline(100.0, ()),  # the guest died before anything happened
        Timeline(100.0, LANDED.events, (VmEvent("late", "resumed", 104.0),)),
        Timeline(100.0, LANDED.events, (VmEvent("lost", "paused", 99.0),)),
    ):
        log = GuestLog("old", (Jump("old", "new", False, timeline),), "")
        page = render([Cell(Route(OLD, NEW, 1), run(Verdict("t", Outcome.CRASHED, guests=(log,))))])
        widths = [float(width) for width in re.findall(r'style="width: (-?[\d.]+)%"', page)]
        assert all(0 <= width <= 100 for width in widths)
        assert ("lost: did not go on" in page) == any(e.vm == "lost" for e in timeline.vm_events)


def test_a_matrix_of_kernels_that_are_not_there_is_no_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("of yesterday")
    assert main(["vm", "matrix", "--from", "no-such-kernel", "--html", str(page)]) == 69
    assert "there is no kernel 'no-such-kernel'" in capsys.readouterr().err
    assert page.read_text() == "of yesterday"


def test_the_data_of_a_cell_is_json() -> None:
    data = json.loads(json.dumps(Cell(Route(OLD, NEW, 2), run(CRASHED, status=1)).to_data()))
    assert (data["from"], data["to"], data["direction"]) == ("old", "new", "upgrade")
    assert (data["outcome"], data["tests"][0]["cause"]) == ("failed", "kernel panic")
