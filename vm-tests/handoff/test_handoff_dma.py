"""A device that does DMA while it goes from one process to the next."""

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
# By mode of accounting, what a process is charged with for the RAM that is mapped for it.
CHARGED = {
    "user": {"VmPin": PINNED, "VmLck": 0},  # what its user has locked is in no file of /proc
    "process": {"VmPin": PINNED, "VmLck": PINNED},
}
WAYS = ["socket", "exec"]
TRIES = 5
REFUSABLE = [("socket", "user"), ("socket", "process"), ("exec", "user")]


def bug(reason: str) -> pytest.MarkDecorator:
    """Told in docs/kernel-bugs.md; the day a kernel mends it, the test turns red."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


@pytest.fixture(scope="module")
def handed_over(kernel: Kernel) -> Iterator[HandOver]:
    """What two processes saw, by way and accounting; each combination is carried out once.

    If the transfer on its way ended before the change of the process did, which a busy machine
    brings about, nothing is known of DMA across it: then once more.
    """
    # What is refused, and done, makes the kernel warn.
    with VM(kernel, expects=[Complaint.WARNING], **guest_edu.GUEST) as vm:  # type: ignore[arg-type]

        @functools.cache
        def seen(how: str, accounting: str, obstacle: str = "") -> dict[str, Any]:
            told: dict[str, Any] = {}
            for _ in range(TRIES):
                told = vm.call(guest_handoff.hand_over, how, accounting, obstacle)
                if told["across"] or told["wrong"]:
                    break
            return told

        yield seen


@pytest.mark.parametrize("accounting", guest_handoff.ACCOUNTINGS)
@pytest.mark.parametrize("how", WAYS)
def test_no_transfer_is_lost_while_the_device_changes_hands(
    handed_over: HandOver, how: str, accounting: str
) -> None:
    seen = handed_over(how, accounting)
    assert seen["transfers"] == 2 * TRANSFERS + 1
    assert seen["wrong"] == []
    assert seen["faults"] == []


@pytest.mark.parametrize("accounting", guest_handoff.ACCOUNTINGS)
@pytest.mark.parametrize("how", WAYS)
def test_dma_runs_on_while_the_process_is_changed(
    handed_over: HandOver, how: str, accounting: str
) -> None:
    seen = handed_over(how, accounting)
    assert seen["across"]
    assert seen["wrong"] == []


@pytest.mark.parametrize("accounting", CHARGED)
def test_what_is_pinned_and_locked_moves_to_the_successor(
    handed_over: HandOver, accounting: str
) -> None:
    seen = handed_over("socket", accounting)
    assert seen["old_before"] == seen["new_after"] == CHARGED[accounting]
    assert seen["old_after"] == seen["new_before"] == seen["new_unmapped"] == NOTHING


def test_what_is_pinned_moves_through_exec(handed_over: HandOver) -> None:
    seen = handed_over("exec", "user")
    assert seen["old_before"] == seen["new_after"] == CHARGED["user"]
    assert seen["new_before"] == seen["new_unmapped"] == NOTHING


def test_room_to_lock_moves_from_process_to_process(handed_over: HandOver) -> None:
    seen = handed_over("socket", "process")
    assert not seen["old_room_before"]
    assert seen["old_room_after"]


def test_room_to_lock_moves_from_user_to_user(handed_over: HandOver) -> None:
    seen = handed_over("socket", "user", "other user")
    assert not seen["old_room_before"]
    assert seen["old_room_after"]
    assert not seen["new_room"]
    assert seen["wrong"] == []


@pytest.mark.parametrize("how", WAYS)
def test_nothing_is_locked_for_a_process_with_cap_ipc_lock(handed_over: HandOver, how: str) -> None:
    seen = handed_over(how, "none")
    assert all(seen[when]["VmLck"] == 0 for when in ("old_before", "new_before", "new_after"))


@bug("of memory that is mapped with CAP_IPC_LOCK, the pinned count stays with the old process")
def test_what_is_pinned_moves_with_cap_ipc_lock_too(handed_over: HandOver) -> None:
    seen = handed_over("socket", "none")
    require(seen["old_before"]["VmPin"] == PINNED, "nothing was counted as pinned at first")
    assert seen["old_after"] == seen["new_unmapped"] == NOTHING


@bug("a process that is gone cannot be given its count back, and the change is refused, and done")
def test_what_is_locked_moves_through_exec(handed_over: HandOver) -> None:
    seen = handed_over("exec", "process")
    require(seen["old_before"] == CHARGED["process"], "nothing was counted as locked at first")
    assert "refused" not in seen
    assert seen["new_unmapped"] == NOTHING


def test_a_change_that_is_refused_and_done_is_told_as_what_it_is(handed_over: HandOver) -> None:
    kind, text = handed_over("exec", "process")["refused"]
    assert kind == "LuoError"
    assert "the process that mapped the memory is gone" in text


@pytest.mark.parametrize(("how", "accounting"), REFUSABLE)
def test_a_change_of_process_is_refused_while_something_is_mapped_by_its_address(
    handed_over: HandOver, how: str, accounting: str
) -> None:
    seen = handed_over(how, accounting, "user mapping")
    kind, text = seen["refused"]
    assert kind == "UserMappingError"
    assert "map a memfd with `Ioas.map_file` instead" in text
    assert seen["new_after"] == seen["new_before"] == NOTHING
    assert seen["wrong"] == []
    assert seen["faults"] == []


def test_a_successor_without_room_for_locked_memory_changes_nothing(
    handed_over: HandOver,
) -> None:
    seen = handed_over("socket", "process", "limit")
    kind, text = seen["refused"]
    assert kind == "LuoError"
    assert "RLIMIT_MEMLOCK" in text
    assert "nothing has changed" in text
    assert seen["old_after"] == seen["old_before"] == CHARGED["process"]
    assert seen["new_after"] == NOTHING
    assert seen["wrong"] == []
