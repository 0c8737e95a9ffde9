"""What the tests of faults run in the guest; imports only pyluo and the stdlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sessions.guest_files import pattern

from pyluo import LiveUpdate, Memfd, OutgoingSession, PreservedMemoryError, session_from_fd
from pyluo.guest.faults import MemoryHog, Victim, each_fails, failslab

if TYPE_CHECKING:
    from pyluo.guest.faults import Reach

SIZE = 1 << 20


def _holder(name: str, reach: Reach) -> None:
    with LiveUpdate() as device:
        session = device.create_session(name)
    reach("create", session=session.fileno())
    with Memfd.create("ram", SIZE) as ram:
        ram.write(pattern(SIZE), 0)
        session.preserve(ram, 1)
    reach("preserve", session=session.fileno())


def _hold_alone(reach: Reach) -> None:
    _holder("alone", reach)


def _hold_shared(reach: Reach) -> None:
    _holder("shared", reach)


def kill_two_holders() -> list[OutgoingSession]:
    """One of which has shared its session."""
    Victim(_hold_alone, stop_at="preserve").kill()
    victim = Victim(_hold_shared, stop_at="preserve", share=["session"])
    victim.kill()
    kept = session_from_fd(victim.shared["session"])
    assert isinstance(kept, OutgoingSession)
    return [kept]


def stop_where_nobody_comes(step: str) -> None:
    Victim(_hold_alone, stop_at=step)


def _fall(reach: Reach) -> None:
    reach("stand")
    raise ValueError("the ground gave way")


def stop_after_a_fall() -> None:
    Victim(_fall, stop_at="stand up")


def _freeze(reach: Reach) -> None:
    os.kill(os.getpid(), 9)


def stop_after_an_end() -> None:
    Victim(_freeze, stop_at="wake")


def preserve_while_each_allocation_fails() -> tuple[OutgoingSession, Memfd, int]:
    """Preserves a second file beside a first one; how often that was refused."""
    first, second = _file(), _file()
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    session.preserve(first, 1)
    refused = 0
    for fault in each_fails():
        try:
            with fault:
                session.preserve(second, 2)
            break
        except (OSError, MemoryError):
            refused += 1
    return session, second, refused


def both_intact() -> bool:
    with LiveUpdate() as device, device.retrieve_session("vm0") as session:
        contents = []
        for token in (1, 2):
            with session.retrieve(token, Memfd) as ram:
                contents.append(ram.read(ram.size, 0))
    return contents == [pattern(SIZE)] * 2


def times_refused(held: tuple[OutgoingSession, Memfd, int]) -> int:
    return held[2]


def preserve_while_all_allocations_fail() -> tuple[OutgoingSession, list[str]]:
    """Tries twice, with and without the fault; what came of it."""
    outcomes = []
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    ram = _file()
    try:
        with failslab():
            session.preserve(ram, 1)
        outcomes.append("preserved")
    except (OSError, MemoryError) as error:
        outcomes.append(type(error).__name__)
    session.preserve(ram, 1)
    outcomes.append("preserved")
    return session, outcomes


def outcomes_of(held: tuple[OutgoingSession, list[str]]) -> list[str]:
    return held[1]


def throw_an_allocation() -> None:
    for fault in each_fails():
        with fault:
            pass


def throw_slabs() -> None:
    with failslab():
        pass


def preserve_under_pressure(left: int) -> tuple[OutgoingSession, MemoryHog, str]:
    """Preserves a file before memory gets short, and another one when it is."""
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    session.preserve(_file(), 1)
    hog = MemoryHog(left)
    refusal = ""
    try:
        session.preserve(_file(), 2)
    except PreservedMemoryError as error:
        refusal = str(error)
    return session, hog, refusal


def state_of(held: tuple[OutgoingSession, MemoryHog, str]) -> tuple[bool, str]:
    return held[1].alive, held[2]


def hog_and_release(left: int) -> tuple[int, int, int]:
    """Available memory before, during and after."""
    before = _available()
    hog = MemoryHog(left)
    during = _available()
    hog.release()
    assert not hog.alive
    return before, during, _available()


def _available() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def _file() -> Memfd:
    ram = Memfd.create("ram", SIZE)
    ram.write(pattern(SIZE), 0)
    return ram
