"""How long a live update takes by what it carries: descriptors, memory, sessions.

A jump carries what pyluo has preserved, and as much that the floor in C has: the kernel's part of
the time is that of twice the size.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from benchmarks.floors import compile_floor, run_floor
from benchmarks.guests import patient_vm
from benchmarks.sessions import SIZE, make_files
from pyluo import LiveUpdate, Memfd
from pyluo.vm.machine.timeline import REBOOT_CALLED, WORKER_UP

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from pyluo import OutgoingSession

    # A size, and the seconds by what was measured.
    Points = Generator[tuple[int, dict[str, float]], None, None]

__all__ = ["choose_sizes", "descriptors", "memory", "sessions"]

MIB = 1 << 20


def choose_sizes() -> tuple[int, ...]:
    """Return sizes in MiB: up to 4 GiB if this machine has the memory for it, else 1 GiB."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (1, 16, 256, 1024, 4096) if free > 16 << 30 else (1, 16, 256, 1024)


def descriptors(kernel: str, sizes: Sequence[int], rounds: int) -> Points:
    """Carry many files in one session."""
    return _carry(kernel, sizes, rounds, lambda size: (1, size, SIZE))


def memory(kernel: str, sizes: Sequence[int], rounds: int) -> Points:
    """Carry a file of many MiB."""
    return _carry(kernel, sizes, rounds, lambda size: (1, 1, size * MIB))


def sessions(kernel: str, sizes: Sequence[int], rounds: int) -> Points:
    """Carry many sessions with a file each."""
    return _carry(kernel, sizes, rounds, lambda size: (size, 1, SIZE))


def _carry(
    kernel: str,
    sizes: Sequence[int],
    rounds: int,
    shape: Callable[[int], tuple[int, int, int]],
) -> Points:
    """Carry what `shape` says for each size: sessions, files of each, and bytes of each file."""
    floor = compile_floor("sessions")
    most = max(sessions * files * size for sessions, files, size in map(shape, sizes))
    with patient_vm(kernel, memory=(2 << 30) + 5 * most // 2) as vm:
        for _ in range(rounds):
            for size in sizes:
                seen = {"preserve, C": run_floor(vm, floor, "hold", "floor", *shape(size))}
                held = vm.hold(preserve, *shape(size))
                seen["preserve"] = vm.call(get_seconds, held)
                jump = vm.live_update()
                seen["freeze and jump"] = jump.between(REBOOT_CALLED, WORKER_UP)
                seen["retrieve"] = vm.call(retrieve, *shape(size)[:2])
                seen["retrieve, C"] = run_floor(vm, floor, "retrieve", "floor", *shape(size))
                yield size, seen


# What runs in the guest:


def preserve(sessions: int, count: int, size: int) -> tuple[float, list[OutgoingSession]]:
    """Preserve files in new sessions; return the seconds, and the sessions."""
    files = make_files(sessions * count, size)
    began = time.perf_counter()
    held = []
    with LiveUpdate() as device:
        for number in range(sessions):
            session = device.create_session(f"ours.{number}")
            part = files[number * count : (number + 1) * count]
            session.preserve_many(dict(enumerate(part, 1)))
            held.append(session)
    seconds = time.perf_counter() - began
    for file in files:
        file.close()
    return seconds, held


def get_seconds(held: tuple[float, list[OutgoingSession]]) -> float:
    """Return the seconds that were held with the sessions."""
    return held[0]


def retrieve(sessions: int, count: int) -> float:
    """Retrieve the sessions and each file, close each file; return the seconds, and finish."""
    make_files(0)  # which allows this process many descriptors
    began = time.perf_counter()
    with LiveUpdate() as device:
        held = [device.retrieve_session(f"ours.{number}") for number in range(sessions)]
    for session in held:
        for token in range(1, count + 1):
            session.retrieve(token, Memfd).close()
    seconds = time.perf_counter() - began
    for session in held:
        session.finish()
    return seconds
