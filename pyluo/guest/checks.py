"""The functions that the tests in `pyluo.vm.run.checks` run in a guest."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

from pyluo import (
    IncomingStore,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    OutgoingSession,
    OutgoingStore,
    RequestError,
    Seal,
)
from pyluo.guest.port import mark

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_files", "check_sessions", "preserve_files", "preserve_sessions", "problems"]

_STORE = "checks"
_PAGE = 4096
_READ_ONLY = Seal.WRITE | Seal.GROW | Seal.SHRINK
# For each file: its name, its size in bytes, the offset and the length of each area that contains
# data, and its seals.
_FILES: tuple[tuple[str, int, tuple[tuple[int, int], ...], Seal], ...] = (
    ("ram", 16 << 20, ((0, 16 << 20),), Seal(0)),
    ("sparse", 64 << 20, ((0, _PAGE), (9 << 20, _PAGE), ((64 << 20) - _PAGE, _PAGE)), Seal(0)),
    ("odd", 5 * _PAGE + 100, ((0, 5 * _PAGE + 100),), Seal(0)),
    ("locked", 64 << 10, ((0, 64 << 10),), _READ_ONLY),
    ("fixed size", 64 << 10, ((0, 64 << 10),), Seal.GROW | Seal.SHRINK),
    ("sealed for good", _PAGE, ((0, _PAGE),), _READ_ONLY | Seal.SEAL),
)
_SESSIONS = 24

# The objects to hold open until the next jump, and a line for each problem that was found.
CheckResult = tuple[OutgoingStore | list[OutgoingSession], list[str]]


def preserve_files() -> CheckResult:
    """Preserve memfds of several kinds, with random content, in a store."""
    store = OutgoingStore.create(_STORE, keeper=KeeperChoice.NONE)
    for name, size, data_areas, seals in _FILES:
        with Memfd.create(name, size) as memfd:
            for offset, length in data_areas:
                memfd.write(os.urandom(length), offset)
            memfd.seal(seals)
            store.add(name, memfd, meta={"crc": _compute_crc(memfd, data_areas)})
    return store, []


def check_files() -> CheckResult:
    """Retrieve the memfds after a jump, check them, and preserve them again."""
    store = IncomingStore.retrieve(_STORE, keeper=KeeperChoice.NONE)
    mark("session retrieved")
    found = list(_compare_files(store))
    mark("descriptors checked")
    return store.renew(), found


def _compare_files(store: IncomingStore) -> Iterator[str]:
    if list(store) != [name for name, *_ in _FILES]:
        yield f"the store has {list(store)}"
    for (name, size, data_areas, seals), entry in zip(_FILES, store.entries, strict=False):
        with store.get(name, Memfd) as memfd:
            mark("descriptor retrieved")
            if memfd.size != size:
                yield f"{name!r} has {memfd.size} bytes instead of {size}"
            elif _compute_crc(memfd, data_areas) != entry.meta["crc"]:
                yield f"the content of {name!r} changed"
            if memfd.seals & ~Seal.EXEC != seals:
                yield f"{name!r} has the seals {memfd.seals!r} instead of {seals!r}"


def _compute_crc(memfd: Memfd, data_areas: tuple[tuple[int, int], ...]) -> int:
    crc = 0
    for offset, length in data_areas:
        crc = zlib.crc32(memfd.read(length, offset), crc)
    return crc


def preserve_sessions() -> CheckResult:
    """Create many sessions, each with one preserved memfd."""
    sessions = []
    with LiveUpdate() as device:
        for number in range(_SESSIONS):
            sessions.append(_make_session(device, number))
    return sessions, []


def check_sessions() -> CheckResult:
    """Retrieve the sessions after a jump, check their memfds, and create the sessions again."""
    sessions, found = [], []
    with LiveUpdate() as device:
        for number in range(_SESSIONS):
            try:
                session = device.retrieve_session(f"session {number}")
                with session.retrieve(number, Memfd) as memfd:
                    if memfd.read(_PAGE, 0) != _make_content(number):
                        found.append(f"the content of session {number} changed")
                session.finish()
            except RequestError as error:
                found.append(str(error))
            else:
                sessions.append(_make_session(device, number))
    return sessions, found


def _make_session(device: LiveUpdate, number: int) -> OutgoingSession:
    session = device.create_session(f"session {number}")
    with Memfd.create("file", _PAGE) as memfd:
        memfd.write(_make_content(number), 0)
        session.preserve(memfd, number)
    return session


def _make_content(number: int) -> bytes:
    return number.to_bytes(2, "little") * (_PAGE // 2)


def problems(result: CheckResult) -> list[str]:
    """Return the problems in the result of a check."""
    return result[1]
