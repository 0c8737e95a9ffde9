"""Tests of the gaps in the lives of VMs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from pyluo.vm.machine.timeline import GuestLog, Jump, Timeline, VmEvent, VmEvents
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


def test_a_gap_is_from_the_pause_of_a_vm_until_it_goes_on() -> None:
    one, two = TIMELINE.gaps
    assert (one.vm, one.length, one.clock, one.counted) == ("one", 5.0, 2.500000001, 2)
    assert (two.vm, two.length, two.clock, two.counted) == ("two", 5.0, None, None)
    assert (one.regressions, two.regressions) == ((), ())
    [lost] = Timeline(100.0, (), EVENTS[:1] + EVENTS[2:3]).gaps
    assert (lost.end, lost.length) == (None, None)


def test_a_clock_or_a_counter_that_goes_back_is_told() -> None:
    for field, value, back in (
        ("clock", 9_999_999_999, replace(EVENTS[3], clock=9_999_999_999)),
        ("counter", 699, replace(EVENTS[3], counter=699)),
    ):
        [gap] = Timeline(100.0, (), (EVENTS[0], EVENTS[2], back)).gaps
        [text] = gap.regressions
        assert text.startswith(f"the {field} of the VM one went back: ")
        assert f"{value} when it was resumed" in text


def test_no_regression_is_lost_when_a_vm_is_paused_again_or_its_host_jumps() -> None:
    events = VmEvents()
    for name, counter in (("paused", 100), ("running on", 50), ("paused", 60), ("resumed", 59)):
        events.add(VmEvent("vm0", name, 1.0, counter=counter))
    events.add(VmEvent("vm0", "paused", 2.0, counter=70))
    events.begin_jump()
    assert [event.counter for event in events.of_last_jump()] == [70]
    events.add(VmEvent("vm0", "resumed", 3.0, counter=69))
    assert [text.partition(": ")[2] for text in events.regressions] == [
        "100 when it was paused, 50 when it was running on",
        "60 when it was paused, 59 when it was resumed",
        "70 when it was paused, 69 when it was resumed",
    ]


def test_gaps_are_kept_in_records() -> None:
    log = GuestLog("stable", (Jump("stable", "stable", True, TIMELINE),), "")
    assert guest_from_data(json.loads(json.dumps(asdict(log)))) == log
