"""Tests of incoming sessions: one jump for all, and a session for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.vm import VM
from sessions import guest_incoming

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

NAMES = [f"s{number}" for number in range(12)]


@pytest.fixture(scope="module")
def landed(kernel: Kernel) -> Iterator[VM]:
    with VM(kernel) as vm:
        vm.hold(guest_incoming.preserve_all, NAMES)
        vm.live_update()
        yield vm


def test_a_session_is_retrieved_once(landed: VM) -> None:
    assert landed.call(guest_incoming.retrieve_a_session_twice, "s0")


def test_a_token_retrieved_twice_is_one_open_file_close_on_exec(landed: VM) -> None:
    assert landed.call(guest_incoming.retrieve_a_token_twice, "s1") == (123, True)


def test_an_exception_leaves_an_incoming_session_as_it_is(landed: VM) -> None:
    assert landed.call(guest_incoming.lose_by_an_exception, "s2")


def test_a_finished_session_is_gone_and_finishing_it_again_is_nothing(landed: VM) -> None:
    assert landed.call(guest_incoming.finish_without_retrieving, "s3") == (True, True)


def test_closing_an_incoming_session_destroys_what_was_not_retrieved(landed: VM) -> None:
    assert landed.call(guest_incoming.close_the_last_descriptor, "s4")


def test_a_retrieved_file_is_preserved_again_only_after_the_finish(landed: VM) -> None:
    assert landed.call(guest_incoming.preserve_again, "s5") == (True, True)


def test_an_incoming_session_is_adopted_as_what_it_is(landed: VM) -> None:
    assert landed.call(guest_incoming.adopt, "s6") == ("s6", True, True)


def test_an_unknown_token_costs_nothing(landed: VM) -> None:
    assert landed.call(guest_incoming.retrieve_an_unknown_token, "s7") == (True, True)


def test_a_file_of_another_kind_than_expected_stays_in_the_session(landed: VM) -> None:
    assert landed.call(guest_incoming.retrieve_as_the_wrong_kind, "s8") == (0, True)


def test_a_session_dropped_without_a_word_stays_open_and_warns(landed: VM) -> None:
    assert landed.call(guest_incoming.drop_unfinished, "s9") == (True, True)


def test_a_descriptor_is_adopted_as_the_session_that_it_is(landed: VM) -> None:
    assert landed.call(guest_incoming.adopt_either, "s10") == [
        "IncomingSession",
        "OutgoingSession",
        "s10",
    ]


def test_many_threads_may_use_an_incoming_session_while_one_finishes_it(landed: VM) -> None:
    retrieved, closed, ended = landed.call(guest_incoming.retrieve_from_many_threads, "s11")
    assert retrieved + closed == 64
    assert retrieved >= 33  # the threads before the one that finishes, less those still running
    assert closed > 0
    assert ended
