"""Tests of what a test's record has of the guests that it used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.vm.machine.timeline import GuestLog
from pyluo.vm.machine.usage import Position, Usage

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pyluo.vm.errors import Cause


class Guest:
    """A guest that only counts."""

    def __init__(self) -> None:
        self.console = ""
        self.requests = 0

    @property
    def position(self) -> Position:
        return Position(self.requests, 0, len(self.console))

    def log_since(self, position: Position) -> GuestLog:
        return GuestLog("k", (), self.console[position.console :])

    def use(self, text: str) -> None:
        self.requests += 1
        self.console += text

    def check(self, *expected: Cause) -> None:
        raise NotImplementedError

    def expecting(self, *causes: Cause) -> AbstractContextManager[None]:
        raise NotImplementedError


def test_the_record_of_a_shared_guest_has_only_what_the_test_itself_did() -> None:
    usage, shared = Usage(), Guest()
    usage.begin_test()
    shared.console = "boot "
    usage.running.append(shared)
    assert usage.find_logs() == [GuestLog("k", (), "boot ")]
    shared.use("one ")
    assert usage.find_logs() == [GuestLog("k", (), "boot one ")]
    usage.begin_test()
    assert usage.find_logs() == []
    shared.use("two ")
    assert usage.find_logs() == [GuestLog("k", (), "two ")]
    usage.begin_test()
    shared.use("three ")
    usage.count_end(shared)
    assert (usage.running, usage.find_logs()) == ([], [GuestLog("k", (), "three ")])


def test_the_first_boot_is_told_once() -> None:
    usage, told = Usage(), list[int]()
    usage.on_first_boot = lambda: told.append(usage.boots)
    for _ in range(3):
        usage.count_boot()
    assert (told, usage.boots) == ([0], 3)
