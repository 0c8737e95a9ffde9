"""The functions that `pyluo demo` runs in a guest."""

from __future__ import annotations

import os
import sys

from pyluo import LiveUpdate, Memfd, OutgoingSession, TokenNotFoundError
from pyluo.guest.port import mark

__all__ = ["digest", "preserve", "retrieve"]

_SESSION = "demo"
_RAM, _NEIGHBOUR = 1, 2
_FILES = ("/run/neighbour", "/dev/shm/neighbour")
_TEXT = b"not preserved"
_CHUNK = 1 << 20


def preserve(size: int) -> tuple[OutgoingSession, Memfd, Memfd]:
    """Preserve a memfd of random bytes, and create a memfd and files that are not preserved.

    Args:
        size: the size of the preserved memfd in bytes.

    Returns:
        The session, the preserved memfd, and the memfd that is not preserved.
    """
    ram, neighbour = Memfd.create("ram", size), Memfd.create("neighbour", len(_TEXT))
    for offset in range(0, size, _CHUNK):
        ram.write(os.urandom(min(_CHUNK, size - offset)), offset)
    neighbour.write(_TEXT, 0)
    for path in _FILES:
        with open(path, "wb") as file:
            file.write(_TEXT)
    with LiveUpdate() as device:
        session = device.create_session(_SESSION)
    session.preserve(ram, _RAM)
    return session, ram, neighbour


def digest(preserved: tuple[OutgoingSession, Memfd, Memfd]) -> str:
    """Return the SHA-256 of the preserved memfd in the result of `preserve`."""
    return _sha256(preserved[1])


def retrieve(corrupt: bool) -> tuple[str, list[str]]:
    """Retrieve the preserved memfd after the jump.

    Args:
        corrupt: whether to change a byte of the memfd, so that the digest must differ.

    Returns:
        The SHA-256 of the memfd, and the names of files that still exist but were not preserved.
    """
    with LiveUpdate() as device:
        session = device.retrieve_session(_SESSION)
    mark("session retrieved")
    with session.retrieve(_RAM, Memfd) as ram:
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
    # Import the module that the standard library's `random` imports too: hashlib would load
    # OpenSSL, which takes a third of a second under TCG.
    try:
        if sys.version_info >= (3, 12):
            from _sha2 import sha256
        else:
            from _sha256 import sha256
    except ImportError:
        from hashlib import sha256

    total = sha256()
    for offset in range(0, memfd.size, _CHUNK):
        total.update(memfd.read(_CHUNK, offset))
    return str(total.hexdigest())
