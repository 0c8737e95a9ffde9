"""The guest's part of `pyluo.vm.run.checks`."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

from pyluo import FdStore, LiveUpdate, LuoError, Memfd, OutgoingSession, Seal
from pyluo.guest.port import mark

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["build", "build_sessions", "carry_on", "carry_sessions_on", "complaints"]

_STORE = "checks"
_PAGE = 4096
_LOCKED = Seal.WRITE | Seal.GROW | Seal.SHRINK
# Name, size in bytes, where data lies in it, seals.
_FILES: tuple[tuple[str, int, tuple[tuple[int, int], ...], Seal], ...] = (
    ("ram", 16 << 20, ((0, 16 << 20),), Seal(0)),
    ("sparse", 64 << 20, ((0, _PAGE), (9 << 20, _PAGE), ((64 << 20) - _PAGE, _PAGE)), Seal(0)),
    ("odd", 5 * _PAGE + 100, ((0, 5 * _PAGE + 100),), Seal(0)),
    ("locked", 64 << 10, ((0, 64 << 10),), _LOCKED),
    ("of fixed size", 64 << 10, ((0, 64 << 10),), Seal.GROW | Seal.SHRINK),
    ("for good", _PAGE, ((0, _PAGE),), _LOCKED | Seal.SEAL),
)
_SESSIONS = 24

Carried = tuple[FdStore | list[OutgoingSession], list[str]]


def build() -> Carried:
    """Preserves files of several kinds with random content, in a descriptor store."""
    store = FdStore.create(_STORE)
    for name, size, places, seals in _FILES:
        with Memfd.create(name, size) as memfd:
            for offset, length in places:
                memfd.write(os.urandom(length), offset)
            memfd.seal(seals)
            store.add(name, memfd, meta={"crc": _crc(memfd, places)})
    return store, []


def carry_on() -> Carried:
    """Looks at all files after a jump, and preserves them again."""
    store = FdStore.retrieve(_STORE)
    mark("session retrieved")
    wrong = list(_differences(store))
    mark("descriptors checked")
    store.renew()
    return store, wrong


def _differences(store: FdStore) -> Iterator[str]:
    if list(store) != [name for name, *_ in _FILES]:
        yield f"the store has {list(store)}"
    for (name, size, places, seals), entry in zip(_FILES, store.entries, strict=False):
        with store.get(name, Memfd) as memfd:
            mark("descriptor retrieved")
            if memfd.size != size:
                yield f"{name!r} has {memfd.size} bytes, and had {size}"
            elif _crc(memfd, places) != entry.meta["crc"]:
                yield f"{name!r} has another content"
            if memfd.seals & ~Seal.EXEC != seals:
                yield f"{name!r} has the seals {memfd.seals!r}, and had {seals!r}"


def _crc(memfd: Memfd, places: tuple[tuple[int, int], ...]) -> int:
    crc = 0
    for offset, length in places:
        crc = zlib.crc32(memfd.read(length, offset), crc)
    return crc


def build_sessions() -> Carried:
    """Makes many sessions with a file each."""
    made = []
    with LiveUpdate() as device:
        for number in range(_SESSIONS):
            made.append(_session(device, number))
    return made, []


def carry_sessions_on() -> Carried:
    """Looks at all sessions after a jump, finishes them, and makes them again."""
    made, wrong = [], []
    with LiveUpdate() as device:
        for number in range(_SESSIONS):
            try:
                with (
                    device.retrieve_session(f"session {number}") as session,
                    session.retrieve(number, Memfd) as memfd,
                ):
                    if memfd.read(_PAGE, 0) != _content(number):
                        wrong.append(f"session {number} has another content")
            except LuoError as error:
                wrong.append(str(error))
            else:
                made.append(_session(device, number))
    return made, wrong


def _session(device: LiveUpdate, number: int) -> OutgoingSession:
    session = device.create_session(f"session {number}")
    with Memfd.create("file", _PAGE) as memfd:
        memfd.write(_content(number), 0)
        session.preserve(memfd, number)
    return session


def _content(number: int) -> bytes:
    return number.to_bytes(2, "little") * (_PAGE // 2)


def complaints(carried: Carried) -> list[str]:
    """What was wrong after the jump."""
    return carried[1]
