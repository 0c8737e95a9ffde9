"""Tests of handing a device over to another process while it does DMA."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
from sessions.guest_bugs import require
from vfio import guest_edu

from handoff import guest_handoff
from handoff.guest_handoff import PINNED, TRANSFERS
from pyluo.vm import VM, Complaint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.vm import Kernel

    HandOver = Callable[..., dict[str, Any]]

NOTHING = {"VmPin": 0, "VmLck": 0}
# What each mode of accounting charges a process with for the RAM that is mapped for it, in KiB.
CHARGED = {
    "user": {"VmPin": PINNED, "VmLck": 0},  # no file of /proc says what a user has locked
    "process": {"VmPin": PINNED, "VmLck": PINNED},
}
WAYS = ["socket", "exec"]
TRIES = 5
REFUSABLE = [("socket", "user"), ("socket", "process"), ("exec", "user")]


def bug(reason: str) -> pytest.MarkDecorator:
    """Expect a failure that kernel-bugs.md describes; a fixed kernel fails the test."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


@pytest.fixture(scope="module")
def hand_over(kernel: Kernel) -> Iterator[HandOver]:
    """A function that hands a device over, and returns what both processes report.

    Each combination of arguments is carried out once. On a busy machine, though, the transfer in
    flight may end before the change of process does; the handoff is then repeated, as it says
    nothing about DMA during the change.
    """
    # The kernel warns about a change of process that it refuses, but carries out.
    with VM(kernel, expects=[Complaint.WARNING], **guest_edu.GUEST) as vm:  # type: ignore[arg-type]

        @functools.cache
        def hand_over_once(how: str, accounting: str, obstacle: str = "") -> dict[str, Any]:
            report: dict[str, Any] = {}
            for _ in range(TRIES):
                report = vm.call(guest_handoff.hand_over, how, accounting, obstacle)
                if report["across"] or report["wrong"]:
                    break
            return report

        yield hand_over_once


@pytest.mark.parametrize("accounting", guest_handoff.ACCOUNTINGS)
@pytest.mark.parametrize("how", WAYS)
def test_no_transfer_is_lost_while_the_device_changes_hands(
    hand_over: HandOver, how: str, accounting: str
) -> None:
    report = hand_over(how, accounting)
    assert report["transfers"] == 2 * TRANSFERS + 1
    assert report["wrong"] == []
    assert report["faults"] == []


@pytest.mark.parametrize("accounting", guest_handoff.ACCOUNTINGS)
@pytest.mark.parametrize("how", WAYS)
def test_dma_runs_on_while_the_process_is_changed(
    hand_over: HandOver, how: str, accounting: str
) -> None:
    report = hand_over(how, accounting)
    assert report["across"]
    assert report["wrong"] == []


@pytest.mark.parametrize("accounting", CHARGED)
def test_what_is_pinned_and_locked_moves_to_the_successor(
    hand_over: HandOver, accounting: str
) -> None:
    report = hand_over("socket", accounting)
    assert report["old_before"] == report["new_after"] == CHARGED[accounting]
    assert report["old_after"] == report["new_before"] == report["new_unmapped"] == NOTHING


def test_what_is_pinned_moves_through_exec(hand_over: HandOver) -> None:
    report = hand_over("exec", "user")
    assert report["old_before"] == report["new_after"] == CHARGED["user"]
    assert report["new_before"] == report["new_unmapped"] == NOTHING


def test_room_to_lock_moves_from_process_to_process(hand_over: HandOver) -> None:
    report = hand_over("socket", "process")
    assert not report["old_room_before"]
    assert report["old_room_after"]


def test_room_to_lock_moves_from_user_to_user(hand_over: HandOver) -> None:
    report = hand_over("socket", "user", "other user")
    assert not report["old_room_before"]
    assert report["old_room_after"]
    assert not report["new_room"]
    assert report["wrong"] == []


@pytest.mark.parametrize("how", WAYS)
def test_nothing_is_locked_for_a_process_with_cap_ipc_lock(hand_over: HandOver, how: str) -> None:
    report = hand_over(how, "none")
    assert all(report[when]["VmLck"] == 0 for when in ("old_before", "new_before", "new_after"))


@bug("of memory that is mapped with CAP_IPC_LOCK, the pinned count stays with the old process")
def test_what_is_pinned_moves_with_cap_ipc_lock_too(hand_over: HandOver) -> None:
    report = hand_over("socket", "none")
    require(report["old_before"]["VmPin"] == PINNED, "nothing was counted as pinned at first")
    assert report["old_after"] == report["new_unmapped"] == NOTHING


@bug("a process that is gone cannot be given its count back, and the change is refused, and done")
def test_what_is_locked_moves_through_exec(hand_over: HandOver) -> None:
    report = hand_over("exec", "process")
    require(report["old_before"] == CHARGED["process"], "nothing was counted as locked at first")
    assert "refused" not in report
    assert report["new_unmapped"] == NOTHING


def test_a_change_that_is_refused_and_done_is_told_as_what_it_is(hand_over: HandOver) -> None:
    kind, text = hand_over("exec", "process")["refused"]
    assert kind == "IommuError"
    assert "the process that mapped the memory has ended" in text


@pytest.mark.parametrize(("how", "accounting"), REFUSABLE)
def test_a_change_of_process_is_refused_while_something_is_mapped_by_its_address(
    hand_over: HandOver, how: str, accounting: str
) -> None:
    report = hand_over(how, accounting, "user mapping")
    kind, text = report["refused"]
    assert kind == "UserMappingError"
    assert "map a memfd with `Ioas.map_file` instead" in text
    assert report["new_after"] == report["new_before"] == NOTHING
    assert report["wrong"] == []
    assert report["faults"] == []


def test_a_successor_without_room_for_locked_memory_changes_nothing(
    hand_over: HandOver,
) -> None:
    report = hand_over("socket", "process", "limit")
    kind, text = report["refused"]
    assert kind == "IommuError"
    assert "RLIMIT_MEMLOCK" in text
    assert "nothing has changed" in text
    assert report["old_after"] == report["old_before"] == CHARGED["process"]
    assert report["new_after"] == NOTHING
    assert report["wrong"] == []
