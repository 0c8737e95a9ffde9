"""Functions that the tests of faults run in the guest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sessions.guest_files import pattern

from pyluo import LiveUpdate, Memfd, OutgoingSession, PreservedMemoryError, session_from_fd
from pyluo.guest.faults import MemoryHog, Victim, each_fails, failslab

if TYPE_CHECKING:
    from pyluo.guest.faults import ReachStep

SIZE = 1 << 20


def _hold_session(name: str, reach: ReachStep) -> None:
    with LiveUpdate() as device:
        session = device.create_session(name)
    reach("create", session=session.fileno())
    with Memfd.create("ram", SIZE) as ram:
        ram.write(pattern(SIZE), 0)
        session.preserve(ram, 1)
    reach("preserve", session=session.fileno())


def _hold_alone(reach: ReachStep) -> None:
    _hold_session("alone", reach)


def _hold_shared(reach: ReachStep) -> None:
    _hold_session("shared", reach)


def kill_two_holders() -> list[OutgoingSession]:
    """Kill two holders of a session; only the second one has shared its session."""
    Victim(_hold_alone, stop_at="preserve").kill()
    victim = Victim(_hold_shared, stop_at="preserve", share=["session"])
    victim.kill()
    session = session_from_fd(victim.shared["session"])
    assert isinstance(session, OutgoingSession)
    return [session]


def stop_at_step_not_reached(step: str) -> None:
    Victim(_hold_alone, stop_at=step)


def _raise(reach: ReachStep) -> None:
    reach("stand")
    raise ValueError("the ground gave way")


def stop_after_exception() -> None:
    Victim(_raise, stop_at="stand up")


def _kill_itself(reach: ReachStep) -> None:
    os.kill(os.getpid(), 9)


def stop_after_kill() -> None:
    Victim(_kill_itself, stop_at="wake")


def preserve_while_each_allocation_fails() -> tuple[OutgoingSession, Memfd, int]:
    """Preserve a second file while one allocation after the other fails.

    Returns:
        The session, the file, and how often preserving it was refused.
    """
    first, second = _create_filled_memfd(), _create_filled_memfd()
    session = _create_session_with(first)
    refused = 0
    for fault in each_fails():
        try:
            with fault:
                session.preserve(second, 2)
        except (OSError, MemoryError):
            refused += 1
        else:
            if not fault.injected:
                break
            # It was an allocation that the request can do without.
            session.discard()
            session = _create_session_with(first)
    return session, second, refused


def _create_session_with(first: Memfd) -> OutgoingSession:
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    session.preserve(first, 1)
    return session


def are_both_files_intact() -> bool:
    with LiveUpdate() as device:
        session = device.retrieve_session("vm0")
    contents = []
    for token in (1, 2):
        with session.retrieve(token, Memfd) as ram:
            contents.append(ram.read(ram.size, 0))
    session.finish()
    return contents == [pattern(SIZE)] * 2


def get_refusal_count(held: tuple[OutgoingSession, Memfd, int]) -> int:
    return held[2]


def preserve_while_all_allocations_fail() -> tuple[OutgoingSession, list[str]]:
    """Preserve a file with the fault and then without it; return both outcomes."""
    outcomes = []
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    ram = _create_filled_memfd()
    try:
        with failslab():
            session.preserve(ram, 1)
        outcomes.append("preserved")
    except (OSError, MemoryError) as error:
        outcomes.append(type(error).__name__)
    session.preserve(ram, 1)
    outcomes.append("preserved")
    return session, outcomes


def get_outcomes(held: tuple[OutgoingSession, list[str]]) -> list[str]:
    return held[1]


def inject_one_failed_allocation() -> None:
    for fault in each_fails():
        with fault:
            pass


def inject_failed_slabs() -> None:
    with failslab():
        pass


def preserve_under_pressure(left: int) -> tuple[OutgoingSession, MemoryHog, str]:
    """Preserve one file before memory gets short, and another one when it is.

    Args:
        left: the bytes of memory that are left available.

    Returns:
        The session, what takes up the memory, and the message that refused the second file.
    """
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    session.preserve(_create_filled_memfd(), 1)
    hog = MemoryHog(left)
    refusal = ""
    try:
        session.preserve(_create_filled_memfd(), 2)
    except PreservedMemoryError as error:
        refusal = str(error)
    return session, hog, refusal


def get_shortage_state(held: tuple[OutgoingSession, MemoryHog, str]) -> tuple[bool, str]:
    return held[1].alive, held[2]


def take_and_release_memory(left: int) -> tuple[int, int, int]:
    """Return the available memory in bytes before, during and after the shortage."""
    before = _read_available_memory()
    hog = MemoryHog(left)
    during = _read_available_memory()
    hog.release()
    assert not hog.alive
    return before, during, _read_available_memory()


def _read_available_memory() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def _create_filled_memfd() -> Memfd:
    ram = Memfd.create("ram", SIZE)
    ram.write(pattern(SIZE), 0)
    return ram
