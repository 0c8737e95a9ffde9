"""Tests of the gaps in the lives of VMs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from pyluo.vm.machine.timeline import GuestLog, Jump, Timeline, VmEvent
from pyluo.vm.results.json_lines import guest_from_data

EVENTS = (
    VmEvent("one", "paused", 98.0, clock=10_000_000_000, counter=700),
    VmEvent("two", "paused", 99.0),
    VmEvent("one", "stored", 99.5),
    VmEvent("one", "resumed", 103.0, clock=12_500_000_000, counter=700),
    VmEvent("two", "resumed", 104.0, clock=1, counter=1),
    VmEvent("one", "heard again", 103.5, clock=12_500_000_001, counter=702),
)
TIMELINE = Timeline(100.0, (), EVENTS)


def test_a_gap_is_from_the_first_event_of_a_vm_to_its_last() -> None:
    one, two = TIMELINE.gaps
    assert (one.vm, one.length, one.clock, one.counted) == ("one", 5.5, 2.500000001, 2)
    assert (two.vm, two.length, two.clock, two.counted) == ("two", 5.0, None, None)
    assert (one.regressions, two.regressions) == ((), ())


def test_a_clock_or_a_counter_that_goes_back_is_told() -> None:
    for field, value, back in (
        ("clock", 9_999_999_999, replace(EVENTS[3], clock=9_999_999_999)),
        ("counter", 699, replace(EVENTS[3], counter=699)),
    ):
        [gap] = Timeline(100.0, (), (EVENTS[0], EVENTS[2], back)).gaps
        [text] = gap.regressions
        assert text.startswith(f"the {field} of the VM one went back: ")
        assert f"{value} when it was resumed" in text


def test_gaps_are_kept_in_records() -> None:
    log = GuestLog("stable", (Jump("stable", "stable", True, TIMELINE),), "")
    assert guest_from_data(json.loads(json.dumps(asdict(log)))) == log
