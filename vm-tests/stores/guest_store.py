"""The guest's part of the tests of descriptor stores.

Imports only pyluo and the standard library.
"""

from __future__ import annotations

import gc
import json
import os
import struct
import warnings
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sessions.guest_files import pattern

from pyluo import (
    AlreadyPreservedError,
    FdStore,
    FdStoreError,
    IncomingSession,
    LiveUpdate,
    LuoError,
    Memfd,
    OutgoingSession,
    OwnedFd,
    PreservedMemoryError,
    contents,
)

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = 40
SIZE = (64 << 20) // FILES


def make(name: str, sizes: dict[str, int]) -> FdStore:
    store = FdStore.create(name)
    for number, (entry, size) in enumerate(sizes.items()):
        with Memfd.create(entry, size) as memfd:
            memfd.write(pattern(size, number), 0)
            store.add(entry, memfd, meta={"crc": zlib.crc32(pattern(size, number))})
    return store


def intact(store: FdStore) -> bool:
    for entry in store.entries:
        with store.get(entry.name, Memfd) as memfd:
            if zlib.crc32(memfd.read(memfd.size, 0)) != entry.meta["crc"]:
                return False
    return True


def make_forty() -> FdStore:
    return make("forty", {f"part {number}": SIZE for number in range(FILES)})


def renew_forty() -> tuple[FdStore, list[str], bool]:
    store = FdStore.retrieve("forty")
    is_intact = intact(store)
    names = list(store)
    store.renew()
    return store, names, is_intact


def get_renewal_result(held: tuple[FdStore, list[str], bool]) -> tuple[list[str], bool]:
    return held[1], held[2]


def make_linked() -> FdStore:
    """Create a store with RAM, a device that requires it, and a log, after removing an entry."""
    store = make("linked", {"gone": 4096, "ram": 8192})
    store.set_meta({"vm": "vm0", "layout": [1, 2]})
    with Memfd.create("device", 4096) as device:
        store.add("device", device, requires=["ram"], meta={"crc": zlib.crc32(bytes(4096))})
    with Memfd.create("log", 4096) as log:
        store.add("log", log, meta={"crc": zlib.crc32(bytes(4096))})
    store.remove("gone")
    return store


def inspect_linked() -> dict[str, Any]:
    store = FdStore.retrieve("linked")
    seen: dict[str, Any] = {"names": list(store), "meta": store.meta, "lost": store.lost}
    store["device"].close()
    try:
        store.finish()
    except FdStoreError as error:
        seen["refusal"] = str(error)
    seen["whole"] = intact(store)
    store.finish()
    store.finish()
    seen["closed"] = store.session.closed
    return seen


def make_many(names: list[str]) -> list[FdStore]:
    return [make(name, {"a": 4096, "b": 8192}) for name in names]


def spoil(store: FdStore, damage: str) -> None:
    """Overwrite the table of a store before the jump."""
    table = store._table
    assert table is not None
    if damage == "nonsense":
        table.memfd.write(b"\x5a" * table.memfd.size, 0)
    else:  # a table of the next version, as a newer pyluo would leave it
        contents.VERSION += 1
        table.write(store._contents())
        contents.VERSION -= 1


def make_spoiled(damages: dict[str, str]) -> list[FdStore]:
    stores = make_many(list(damages))
    for store, damage in zip(stores, damages.values(), strict=True):
        spoil(store, damage)
    return stores


def retrieve_spoiled(name: str) -> tuple[int | None, str, bool]:
    """Return the errno and the message, and whether a file can still be retrieved by its token."""
    try:
        FdStore.retrieve(name)
    except FdStoreError as error:
        session = error.session
        assert isinstance(session, IncomingSession)
        with session, session.retrieve(2, Memfd) as memfd:
            return error.errno, str(error), memfd.read(8192, 0) == pattern(8192, 1)
    return None, "", False


def finish_without_one(name: str) -> tuple[bool, bool]:
    """Return whether a finish that names too few entries is refused, and a complete one passes."""
    store = FdStore.retrieve(name)
    store["a"].close()
    try:
        store.finish(destroy=["a"])
        refused = False
    except FdStoreError:
        refused = True
    store.finish(destroy=["b"])
    return refused, store.session.closed


def renew_without_one(name: str) -> list[str]:
    store = FdStore.retrieve(name)
    store.renew(destroy=["a"])
    names = list(store)
    store.discard()
    return names


def leave_renewed_by_an_exception(name: str) -> bool:
    """Return whether a retrieved store keeps its files if an exception leaves its `with` block."""
    store = FdStore.retrieve(name)
    try:
        with store:
            store.renew()
            raise ZeroDivisionError
    except ZeroDivisionError:
        kept = not store.session.closed and intact(store)
    store.discard()
    return kept


def leave_without_retrieving(name: str) -> tuple[bool, bool]:
    """Return whether leaving the `with` block is refused, and all files can be retrieved then."""
    store = FdStore.retrieve(name)
    try:
        with store:
            pass
    except FdStoreError:
        refused = True
    else:
        refused = False
    is_intact = intact(store)
    store.finish()
    return refused, is_intact


def renew_while_the_device_is_busy(name: str) -> tuple[str, bool]:
    store = FdStore.retrieve(name)
    with LiveUpdate() as device:
        try:
            store.renew()
        except LuoError as error:
            error_name = type(error).__name__
        store.renew(device=device)
    is_intact = intact(store)
    store.discard()
    return error_name, is_intact


def preserve_half(name: str) -> FdStore:
    """Create a store whose table has entries that are not preserved when the jump comes."""
    store = make(name, {"a": 4096})
    table, entry = store._table, store._entries["a"]
    assert table is not None
    from dataclasses import replace

    from pyluo.contents import Contents

    announced = replace(entry, name="b", token=7, preserved=False, requires=("a",))
    needing = replace(entry, name="c", token=8, preserved=False, requires=("b",))
    table.write(Contents((replace(entry, preserved=False), announced, needing)))
    return store


def inspect_half(name: str) -> tuple[list[str], tuple[str, ...], bool]:
    store = FdStore.retrieve(name)
    names, is_intact = list(store), intact(store)
    store.finish()
    return names, store.lost, is_intact


class Watched(OutgoingSession):
    """A session that records the entries of the table before each file is preserved."""

    __slots__ = ("seen", "store")
    seen: list[dict[str, bool]]
    store: FdStore

    def preserve(self, fd: OwnedFd | int, token: int, *, allow_noexec: bool = False) -> None:
        if token:
            self.seen.append(read_entries(self.store))
        super().preserve(fd, token, allow_noexec=allow_noexec)


def watch(session: Watched) -> FdStore:
    session.seen = []
    session.store = FdStore(session)
    return session.store


def read_entries(store: FdStore) -> dict[str, bool]:
    """Return the entries in the table itself, and whether it says that they are preserved."""
    read, _, _ = _decode_table(store)
    return {entry.name: entry.preserved for entry in read.entries}


def slot_in_use(store: FdStore) -> int:
    return _decode_table(store)[2]


def _decode_table(store: FdStore) -> tuple[contents.Contents, int, int]:
    table = store._table
    assert table is not None
    return contents.decode(table.memfd.read, table.memfd.size)


def run_after_discard(store: FdStore, action: Callable[[], None]) -> None:
    """Call `action` in the moment when the files of a store are in no session."""

    class Interrupted(OutgoingSession):
        __slots__ = ()

        def discard(self) -> None:
            super().discard()
            action()

    session = store.session
    store._session = Interrupted.from_fd(session.detach(), trusted=True)


def make_version_1(name: str) -> list[object]:
    """Create a store with a table of version 1, made from the description of the format."""
    with LiveUpdate() as device:
        session = device.create_session(name)
    files = {"ram": (9, Memfd.create("ram", 8192)), "device": (3, Memfd.create("device", 4096))}
    entries = []
    for seed, (entry, (token, memfd)) in enumerate(files.items()):
        memfd.write(pattern(memfd.size, seed), 0)
        meta = {"crc": zlib.crc32(pattern(memfd.size, seed))}
        entries.append({"name": entry, "token": token, "meta": meta})
        session.preserve(memfd, token)
    text = json.dumps({"meta": {"at": 1}, "entries": entries}).encode()
    header = struct.Struct("<8sIIQQ")
    check = zlib.crc32(text, zlib.crc32(header.pack(b"pyluoFDS", 1, 0, 1, len(text))))
    table = Memfd.create("table", 1024)
    table.write(header.pack(b"pyluoFDS", 1, check, 1, len(text)) + text, 0)
    session.preserve(table, 0)
    return [session, table, files]


def read_version_1(name: str) -> tuple[list[str], dict[str, Any], list[int], bool]:
    store = FdStore.retrieve(name)
    store.renew()
    tokens = [entry.token for entry in store.entries]
    result = list(store), store.meta, tokens, intact(store) and len(read_entries(store)) == 2
    store.discard()
    return result


class Recording(IncomingSession):
    """A session that records the order in which its files are retrieved."""

    __slots__ = ("tokens",)
    tokens: list[int]

    def retrieve(self, token: int, type: type[Any] = OwnedFd) -> Any:  # noqa: A002
        if token:
            self.tokens.append(token)
        return super().retrieve(token, type)


def make_needing(name: str) -> FdStore:
    store = FdStore.create(name)
    for entry, requires in (("a", []), ("b", []), ("c", ["b", "a"])):
        with Memfd.create(entry, 4096) as memfd:
            store.add(entry, memfd, requires=requires)
    return store


def retrieve_with_prerequisites(name: str) -> list[int]:
    """Return the tokens in the order in which they are retrieved for an entry that needs others."""
    with LiveUpdate() as device:
        session = device.retrieve_session(name)
    recording = Recording.from_fd(session.detach(), trusted=True)
    recording.tokens = []
    store = FdStore(recording)
    store["c"].close()
    store.finish(destroy=["a", "b"])
    return recording.tokens


def renew_what_has_grown(name: str) -> tuple[bool, bool, bool]:
    """Return whether a grown file is refused, all files are intact, and all are renewed."""
    store = FdStore.retrieve(name)
    with store.get("a", Memfd) as a:
        a.resize(1 << 39)
        try:
            store.renew()
            refused = False
        except PreservedMemoryError:
            refused = store.incoming
        a.resize(4096)
    is_intact = intact(store)
    store.renew()
    renewed = read_entries(store) == {"a": True, "b": True}
    store.discard()
    return refused, is_intact, renewed


def renew_and_drop_half_way(name: str) -> tuple[bool, bool]:
    """Return whether dropping a store whose files are in no session warns, and keeps the files."""
    store = FdStore.retrieve(name)
    with LiveUpdate() as device:
        thief = device.create_session("thief")

    class Interrupted(IncomingSession):
        __slots__ = ()

        def finish(self) -> None:
            super().finish()
            thief.preserve(first, 1)

    first = store["a"]
    store._session = Interrupted.from_fd(store.session.detach(), trusted=True)
    with suppress(AlreadyPreservedError):
        store.renew()
    fds = [file.fileno() for file in store._files.values()]
    store.outgoing.discard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store
        gc.collect()
    warned = any("not preserved" in str(each.message) for each in caught)
    kept = [os.fstat(fd).st_size for fd in fds] == [4096, 8192]
    thief.discard()
    first.close()
    for fd in fds:
        os.close(fd)
    return warned, kept
