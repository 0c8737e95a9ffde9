"""The guest's part of `pyluo demo`."""

from __future__ import annotations

import os

from pyluo import LiveUpdate, Memfd, OutgoingSession, TokenNotFoundError
from pyluo.guest.port import mark

__all__ = ["digest", "preserve", "retrieve"]

_SESSION = "demo"
_RAM, _NEIGHBOUR = 1, 2
_FILES = ("/run/neighbour", "/dev/shm/neighbour")
_CHUNK = 1 << 20


def preserve(size: int) -> tuple[OutgoingSession, Memfd, Memfd]:
    """Fills a memfd with random bytes and preserves it, and leaves neighbours beside it."""
    ram, neighbour = Memfd.create("ram", size), Memfd.create("neighbour", size)
    for memfd in (ram, neighbour):
        for offset in range(0, size, _CHUNK):
            memfd.write(os.urandom(min(_CHUNK, size - offset)), offset)
    for path in _FILES:
        with open(path, "wb") as file:
            file.write(os.urandom(_CHUNK))
    with LiveUpdate() as device:
        session = device.create_session(_SESSION)
    session.preserve(ram, _RAM)
    return session, ram, neighbour


def digest(held: tuple[OutgoingSession, Memfd, Memfd]) -> str:
    """The SHA-256 of what was preserved."""
    return _sha256(held[1])


def retrieve(corrupt: bool) -> tuple[str, list[str]]:
    """Gets the memfd back.

    Returns:
        Its SHA-256, and the names of the neighbours that are still there.
    """
    with LiveUpdate() as device:
        session = device.retrieve_session(_SESSION)
    mark("session retrieved")
    with session, session.retrieve(_RAM, Memfd) as ram:
        mark("descriptor retrieved")
        survivors = [path for path in _FILES if os.path.exists(path)]
        try:
            session.retrieve(_NEIGHBOUR, Memfd).close()
            survivors.append("the second memfd")
        except TokenNotFoundError:
            pass
        session.finish()
        mark("finished")
        if corrupt:
            ram.write(bytes([ram.read(1, 0)[0] ^ 1]), 0)
        return _sha256(ram), survivors


def _sha256(memfd: Memfd) -> str:
    import hashlib  # here, since it takes a moment to load, and the jump is being timed

    total = hashlib.sha256()
    for offset in range(0, memfd.size, _CHUNK):
        total.update(memfd.read(_CHUNK, offset))
    return total.hexdigest()
