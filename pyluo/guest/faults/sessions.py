"""Sessions that are being created by many threads, up to the moment of a jump."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.errors import LuoError, SessionNotFoundError, TokenNotFoundError
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd

if TYPE_CHECKING:
    from pyluo.session import OutgoingSession

__all__ = ["Kept", "SessionStorm", "after_the_storm"]

_LEDGER, _TOKEN = "storm", 1
_ENTRY = struct.Struct("=QQQ")  # of each thread: the oldest session, one past the newest, failed


class SessionStorm:
    """Threads that create sessions and discard old ones, until the jump.

    Each session holds a memfd with the session's name in it. Which of them are whole, the threads
    write into another memfd, which is preserved as well: what `after_the_storm` compares with.

    Args:
        threads: how many.
        each: how many sessions each thread keeps at most.
    """

    def __init__(self, threads: int = 10, each: int = 20) -> None:
        self._ledger = Memfd.create("ledger", threads * _ENTRY.size)
        with LiveUpdate() as device:
            self._session = device.create_session(_LEDGER)
            self._session.preserve(self._ledger, _TOKEN)
            # Its own duplicate of the device for each thread, and with it a lock of its own: so
            # that they meet in the kernel.
            devices = [LiveUpdate.from_fd(os.dup(device.fileno())) for _ in range(threads)]
        begun = threading.Barrier(threads + 1)
        for number, device in enumerate(devices):
            arguments = (number, device, each, begun)
            threading.Thread(target=self._create, args=arguments, daemon=True).start()
        begun.wait()

    def _create(self, number: int, device: LiveUpdate, each: int, begun: threading.Barrier) -> None:
        kept: deque[OutgoingSession] = deque()
        oldest = newest = failed = 0
        try:
            while True:
                kept.append(_preserved(device, _name(number, newest)))
                newest += 1
                self._write(number, oldest, newest, failed)
                if newest == 1:
                    begun.wait()
                if len(kept) > each:
                    # Before it is discarded: what the ledger promises has to be true at any time.
                    oldest += 1
                    self._write(number, oldest, newest, failed)
                    kept.popleft().discard()
        except BaseException:
            self._write(number, oldest, newest, 1)
            begun.abort()
            raise

    def _write(self, number: int, *entry: int) -> None:
        self._ledger.write(_ENTRY.pack(*entry), number * _ENTRY.size)


@dataclass(frozen=True, slots=True)
class Kept:
    """What came over of the sessions of a `SessionStorm`.

    Attributes:
        created: how many sessions were created and preserved before the jump.
        promised: how many of them were there, and whole, when it came.
        whole: how many of these came over whole.
        lost: the names of the others.
        half: sessions that were neither promised nor gone: on their way in or out.
        failed: how many threads had stopped before.
    """

    created: int
    promised: int
    whole: int
    lost: tuple[str, ...]
    half: int
    failed: int


def after_the_storm() -> Kept:
    """Retrieves all that came over, and compares it with what was promised."""
    with LiveUpdate() as device:
        entries = _ledger(device)
        lost: list[str] = []
        promised = whole = half = 0
        for number, (oldest, newest, _) in enumerate(entries):
            for place in range(oldest, newest):
                name = _name(number, place)
                promised += 1
                if _is_whole(device, name):
                    whole += 1
                else:
                    lost.append(name)
            around = [place for place in (oldest - 1, newest) if place >= 0]
            half += sum(_is_there(device, _name(number, place)) for place in around)
    created = sum(newest for _, newest, _ in entries)
    failed = sum(entry[2] for entry in entries)
    return Kept(created, promised, whole, tuple(lost), half, failed)


def _name(thread: int, place: int) -> str:
    return f"{_LEDGER} {thread} {place}"


def _preserved(device: LiveUpdate, name: str) -> OutgoingSession:
    session = device.create_session(name)
    with Memfd.create("ram", 4096) as ram:
        ram.write(name.encode(), 0)
        session.preserve(ram, _TOKEN)
    return session


def _ledger(device: LiveUpdate) -> list[tuple[int, int, int]]:
    with device.retrieve_session(_LEDGER) as session, session.retrieve(_TOKEN, Memfd) as ledger:
        return list(_ENTRY.iter_unpack(ledger.read(ledger.size, 0)))


def _is_whole(device: LiveUpdate, name: str) -> bool:
    try:
        with device.retrieve_session(name) as session, session.retrieve(_TOKEN, Memfd) as ram:
            return ram.read(len(name.encode()), 0) == name.encode()
    except (SessionNotFoundError, TokenNotFoundError):
        return False


def _is_there(device: LiveUpdate, name: str) -> bool:
    try:
        with device.retrieve_session(name):
            return True
    except LuoError:
        return False
