"""Many threads that create and discard sessions until the moment of a jump."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.errors import RequestError, SessionNotFoundError, TokenNotFoundError
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd

if TYPE_CHECKING:
    from pyluo.session import OutgoingSession

__all__ = ["SessionStorm", "StormResult", "check_session_storm"]

_LEDGER, _TOKEN = "storm", 1
# What the ledger records for each thread: the number of its oldest session, the number of its
# newest session plus 1, and whether the thread failed (0 or 1).
_ENTRY = struct.Struct("=QQQ")


class SessionStorm:
    """Threads that create sessions, and discard the oldest ones, until the jump.

    Each session preserves a memfd that contains the session's name. Another preserved memfd, the
    ledger, records which sessions are complete. After the jump, `check_session_storm` compares the
    sessions with the ledger.

    Args:
        threads: the number of threads.
        each: how many sessions each thread keeps.
    """

    def __init__(self, threads: int = 10, each: int = 20) -> None:
        self._ledger = Memfd.create("ledger", threads * _ENTRY.size)
        with LiveUpdate() as device:
            self._session = device.create_session(_LEDGER)
            self._session.preserve(self._ledger, _TOKEN)
            # A LiveUpdate object has a lock. Each thread gets its own object, so that the threads
            # contend only for the locks in the kernel.
            devices = [LiveUpdate.from_fd(os.dup(device.fileno())) for _ in range(threads)]
        all_started = threading.Barrier(threads + 1)
        for number, device in enumerate(devices):
            arguments = (number, device, each, all_started)
            threading.Thread(target=self._create_sessions, args=arguments, daemon=True).start()
        all_started.wait()

    def _create_sessions(
        self, number: int, device: LiveUpdate, each: int, all_started: threading.Barrier
    ) -> None:
        kept: deque[OutgoingSession] = deque()
        oldest = newest = failed = 0
        try:
            while True:
                kept.append(_preserve(device, _make_name(number, newest)))
                newest += 1
                self._record(number, oldest, newest, failed)
                if newest == 1:
                    all_started.wait()
                if len(kept) > each:
                    # Record this before the discard: the jump may come at any time, and a session
                    # that the ledger lists must exist.
                    oldest += 1
                    self._record(number, oldest, newest, failed)
                    kept.popleft().discard()
        except BaseException:
            self._record(number, oldest, newest, 1)
            all_started.abort()
            raise

    def _record(self, number: int, *entry: int) -> None:
        self._ledger.write(_ENTRY.pack(*entry), number * _ENTRY.size)


@dataclass(frozen=True, slots=True)
class StormResult:
    """What the jump did to the sessions of a `SessionStorm`.

    Attributes:
        created: how many sessions were created and preserved before the jump.
        promised: how many of these sessions the ledger listed as complete when the jump came.
        intact: how many of the promised sessions were retrieved intact.
        lost: the names of the promised sessions that were not intact.
        partial: how many sessions exist although the ledger does not list them: they were being
            created or discarded when the jump came.
        failed: how many threads had failed before the jump.
    """

    created: int
    promised: int
    intact: int
    lost: tuple[str, ...]
    partial: int
    failed: int


def check_session_storm() -> StormResult:
    """Retrieve the sessions of a `SessionStorm` after the jump; compare them with its ledger."""
    with LiveUpdate() as device:
        entries = _read_ledger(device)
        lost: list[str] = []
        promised = intact = partial = 0
        for number, (oldest, newest, _) in enumerate(entries):
            for index in range(oldest, newest):
                name = _make_name(number, index)
                promised += 1
                if _is_intact(device, name):
                    intact += 1
                else:
                    lost.append(name)
            neighbours = [index for index in (oldest - 1, newest) if index >= 0]
            partial += sum(_exists(device, _make_name(number, index)) for index in neighbours)
    created = sum(newest for _, newest, _ in entries)
    failed = sum(entry[2] for entry in entries)
    return StormResult(created, promised, intact, tuple(lost), partial, failed)


def _make_name(thread: int, index: int) -> str:
    return f"{_LEDGER} {thread} {index}"


def _preserve(device: LiveUpdate, name: str) -> OutgoingSession:
    session = device.create_session(name)
    with Memfd.create("ram", 4096) as ram:
        ram.write(name.encode(), 0)
        session.preserve(ram, _TOKEN)
    return session


def _read_ledger(device: LiveUpdate) -> list[tuple[int, int, int]]:
    session = device.retrieve_session(_LEDGER)
    with session.retrieve(_TOKEN, Memfd) as ledger:
        entries = list(_ENTRY.iter_unpack(ledger.read(ledger.size, 0)))
    session.finish()
    return entries


def _is_intact(device: LiveUpdate, name: str) -> bool:
    try:
        session = device.retrieve_session(name)
        with session.retrieve(_TOKEN, Memfd) as ram:
            intact = ram.read(len(name.encode()), 0) == name.encode()
        session.finish()
        return intact
    except (SessionNotFoundError, TokenNotFoundError):
        return False


def _exists(device: LiveUpdate, name: str) -> bool:
    try:
        device.retrieve_session(name).finish()
        return True
    except RequestError:
        return False
