"""Tests of the global state (FLB) that the kernel keeps while files are preserved.

`CONFIG_LIVEUPDATE_TEST` registers three such objects with the handler of memfds, and logs their
callbacks. Each object is created with the first file that is preserved in the whole system, and
ends with the last.
"""

from __future__ import annotations

from pyluo import IncomingSession, LiveUpdate, OutgoingSession
from pyluo.vm import VM
from sessions import guest_cases

OBJECTS = [f"liveupdate-test-flb-v{number}" for number in range(3)]
TWO_SESSIONS = {"one": {1: b"a", 2: b"b"}, "two": {3: b"c"}}


def find_logged(vm: VM, words: str) -> list[str]:
    """Return the objects that the log mentions with these words, in the order of the log."""
    lines = [line for line in vm.dmesg.splitlines() if words in line]
    return [name for line in lines for name in OBJECTS if f"{name}:" in line]


def test_it_is_made_with_the_first_file_and_given_up_with_the_last() -> None:
    with VM("selftest") as vm:  # whose log has nothing of other tests
        assert find_logged(vm, "preserve was triggered") == []
        empty = vm.hold(guest_cases.preserve, {"empty": {}})
        assert find_logged(vm, "preserve was triggered") == []
        held = vm.hold(guest_cases.preserve, TWO_SESSIONS)
        assert find_logged(vm, "preserve was triggered") == OBJECTS
        vm.call(discard, held, 0)
        assert find_logged(vm, "unpreserve was triggered") == []
        vm.call(discard, held, 1)
        assert sorted(find_logged(vm, "unpreserve was triggered")) == OBJECTS
        vm.call(discard, empty, 0)
        vm.hold(guest_cases.preserve, TWO_SESSIONS)
        # Two of these lines are of preserve; one is of unpreserve, which contains the same words.
        assert find_logged(vm, "preserve was triggered").count(OBJECTS[0]) == 3


def test_the_next_kernel_finds_it_and_finishes_it_with_the_last_file() -> None:
    with VM("selftest") as vm:  # whose log has nothing of other tests
        vm.hold(guest_cases.preserve, TWO_SESSIONS)
        assert find_logged(vm, "found flb data") == []
        vm.live_update()
        assert find_logged(vm, "found flb data from the previous boot") == OBJECTS
        assert find_logged(vm, "finish was triggered") == []
        sessions = vm.hold(retrieve_both)
        vm.call(finish, sessions, 0)
        assert find_logged(vm, "finish was triggered") == []
        vm.call(finish, sessions, 1)
        assert sorted(find_logged(vm, "finish was triggered")) == OBJECTS
        assert "ERROR" not in "".join(line for line in vm.dmesg.splitlines() if "flb" in line)
        vm.live_update()
        assert find_logged(vm, "found flb data") == []


def discard(sessions: list[OutgoingSession], number: int) -> None:
    sessions[number].discard()


def retrieve_both() -> list[IncomingSession]:
    with LiveUpdate() as device:
        return [device.retrieve_session(name) for name in TWO_SESSIONS]


def finish(sessions: list[IncomingSession], number: int) -> None:
    sessions[number].finish()
