"""Preserve and retrieve 5,000 memfds of 4 KiB in a session, by pyluo and by the ioctls from C."""

from __future__ import annotations

import os
import resource
import time
from typing import TYPE_CHECKING, Any

from benchmarks.floors import compile_floor, run_floor
from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair
from pyluo import LiveUpdate, Memfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.ratios import Pairs
    from pyluo import OutgoingSession

__all__ = ["preserve_each_ratio", "preserve_ratio", "retrieve_ratio"]

COUNT = 5000
SIZE = 4096  # bytes


def preserve_ratio(kernel: str, rounds: int) -> Pairs:
    """Preserve them by one call of `preserve_many`."""
    return _compare_preserving(kernel, rounds, preserve_at_once)


def preserve_each_ratio(kernel: str, rounds: int) -> Pairs:
    """Preserve them by a call of `preserve` each."""
    return _compare_preserving(kernel, rounds, preserve_each)


def retrieve_ratio(kernel: str, rounds: int) -> Pairs:
    """Retrieve them one by one, and close each."""
    floor = compile_floor("sessions")
    with patient_vm(kernel) as vm:
        for _ in range(rounds):
            run_floor(vm, floor, "hold", "floor", 1, COUNT, SIZE)
            vm.hold(hold, COUNT)
            vm.live_update()
            above = vm.call(retrieve_each, COUNT)
            yield Pair(above, run_floor(vm, floor, "retrieve", "floor", 1, COUNT, SIZE))


def _compare_preserving(kernel: str, rounds: int, preserve: Any) -> Pairs:
    floor = compile_floor("sessions")
    with patient_vm(kernel) as vm:
        for _ in range(rounds):
            above = vm.call(preserve, COUNT)
            yield Pair(above, run_floor(vm, floor, "preserve", "floor", 1, COUNT, SIZE))


# What runs in the guest:


def make_files(count: int, size: int = SIZE) -> list[Memfd]:
    """Make memfds whose memory is allocated, as the floor does."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    files = [Memfd.create("file", size) for _ in range(count)]
    for file in files:
        os.posix_fallocate(file.fileno(), 0, size)
    return files


def preserve_at_once(count: int) -> float:
    """Preserve files by one call, and give them up; return the seconds of the first."""
    return _time(count, lambda session, files: session.preserve_many(files))


def preserve_each(count: int) -> float:
    """Preserve files one by one, and give them up; return the seconds of the first."""
    return _time(count, _preserve_one_by_one)


def _preserve_one_by_one(session: OutgoingSession, files: dict[int, Memfd]) -> None:
    for token, file in files.items():
        session.preserve(file, token)


def _time(count: int, preserve: Callable[[OutgoingSession, dict[int, Memfd]], None]) -> float:
    files = dict(enumerate(make_files(count), 1))
    began = time.perf_counter()
    with LiveUpdate() as device:
        session = device.create_session("preserved")
    preserve(session, files)
    seconds = time.perf_counter() - began
    session.discard()
    for file in files.values():
        file.close()
    return seconds


def hold(count: int) -> OutgoingSession:
    """Preserve files for the next life."""
    files = make_files(count)
    with LiveUpdate() as device:
        session = device.create_session("held")
    session.preserve_many(dict(enumerate(files, 1)))
    for file in files:
        file.close()
    return session


def retrieve_each(count: int) -> float:
    """Retrieve the files one by one, close each, and finish; return the seconds before that."""
    began = time.perf_counter()
    with LiveUpdate() as device:
        session = device.retrieve_session("held")
    for token in range(1, count + 1):
        session.retrieve(token, Memfd).close()
    seconds = time.perf_counter() - began
    session.finish()
    return seconds
