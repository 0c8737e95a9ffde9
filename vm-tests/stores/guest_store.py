"""The guest's part of the tests of stores.

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
    Entry,
    GuestRam,
    IncomingSession,
    IncomingStore,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    NewEntry,
    NumaMode,
    NumaPolicy,
    OutgoingSession,
    OutgoingStore,
    OwnedFd,
    PreservedMemoryError,
    RequestError,
    StoreError,
)
from pyluo.stores import records
from pyluo.stores.journal import read_contents

if TYPE_CHECKING:
    from pyluo.stores.entry import Contents

FILES = 40
SIZE = (64 << 20) // FILES
ALONE = KeeperChoice.NONE


def make(name: str, sizes: dict[str, int]) -> OutgoingStore:
    store = OutgoingStore.create(name, keeper=ALONE)
    for number, (entry, size) in enumerate(sizes.items()):
        with Memfd.create(entry, size) as memfd:
            memfd.write(pattern(size, number), 0)
            store.add(entry, memfd, meta={"crc": zlib.crc32(pattern(size, number))})
    return store


def retrieve(name: str) -> IncomingStore:
    return IncomingStore.retrieve(name, keeper=ALONE)


def intact(store: IncomingStore) -> bool:
    for entry in store.entries:
        with store.get(entry.name, Memfd) as memfd:
            if zlib.crc32(memfd.read(memfd.size, 0)) != entry.meta["crc"]:
                return False
    return True


def make_forty() -> OutgoingStore:
    return make("forty", {f"part {number}": SIZE for number in range(FILES)})


def renew_forty() -> tuple[OutgoingStore, list[str], bool]:
    store = retrieve("forty")
    is_intact = intact(store)
    return store.renew(), list(store), is_intact


def get_renewal_result(held: tuple[OutgoingStore, list[str], bool]) -> tuple[list[str], bool]:
    return held[1], held[2]


def make_linked() -> OutgoingStore:
    """Create a store with RAM, a device that requires it, and a log, after removing an entry."""
    store = make("linked", {"gone": 4096, "ram": 8192})
    store.set_meta({"vm": "vm0", "layout": (1, 2)})
    with Memfd.create("device", 4096) as device:
        store.add("device", device, requires=["ram"], meta={"crc": zlib.crc32(bytes(4096))})
    with Memfd.create("log", 4096) as log:
        store.add("log", log, meta={"crc": zlib.crc32(bytes(4096))})
    store.remove("gone")
    return store


def inspect_linked() -> dict[str, Any]:
    store = retrieve("linked")
    seen: dict[str, Any] = {"names": list(store), "meta": store.meta, "lost": store.lost}
    device = store["device"]
    seen["refusal"] = refusal_of_finish(store)
    seen["whole"] = intact(store)
    store.finish(destroy=["ram", "log"])
    store.finish()
    seen["closed"] = store.session.closed
    device.close()
    return seen


def refusal_of_finish(store: IncomingStore, destroy: tuple[str, ...] = ()) -> str:
    try:
        store.finish(destroy=destroy)
    except StoreError as error:
        return str(error)
    return ""


def make_many(names: list[str]) -> list[OutgoingStore]:
    return [make(name, {"a": 4096, "b": 8192}) for name in names]


def first_segment(store: OutgoingStore) -> Memfd:
    return store._journal.memfds[0]


def make_spoiled(damages: list[str]) -> list[OutgoingStore]:
    """Create stores, and overwrite parts of their tables before the jump."""
    stores = make_many(damages)
    for store, damage in zip(stores, damages, strict=True):
        segment = first_segment(store)
        if damage == "nonsense":
            segment.write(b"\x5a" * segment.size, 0)
        elif damage == "a record":
            segment.write(b"\x5a", records.RECORDS_OFFSET + 30)
        else:  # a table of the next version, as a newer pyluo would leave it
            header = (records.MAGIC, records.VERSION + 1)
            check = zlib.crc32(records.HEADER.pack(*header, 0, 1, 0))
            segment.write(records.HEADER.pack(*header, check, 1, 0), 0)
    return stores


def retrieve_spoiled(name: str) -> tuple[int | None, str, bool]:
    """Return the errno and the message, and whether a file can still be retrieved by its token."""
    try:
        retrieve(name)
    except StoreError as error:
        session = error.session
        assert isinstance(session, IncomingSession)
        with session.retrieve(2, Memfd) as memfd:
            rescued = memfd.read(8192, 0) == pattern(8192, 1)
        session.finish()
        return error.errno, str(error), rescued
    return None, "", False


def finish_without_one(name: str) -> list[str]:
    """Return the refusals of finishing a store, while less and less of it would be destroyed."""
    store = retrieve(name)
    refusals = [refusal_of_finish(store)]
    store["a"].close()
    refusals.append(refusal_of_finish(store, destroy=("b",)))  # "a" is closed again
    a = store["a"]
    refusals.append(refusal_of_finish(store, destroy=("b",)))
    a.close()
    return refusals


def finish_what_is_in_use(name: str) -> bool:
    """Return whether files count as in use by a duplicate and by a mapping of them."""
    store = retrieve(name)
    with store.get("a", Memfd) as a, store.get("b", Memfd) as b:
        duplicate, mapping = os.dup(a.fileno()), b.map()
    store.finish()
    is_intact = os.pread(duplicate, 4096, 0) == pattern(4096, 0)
    is_intact &= mapping[:] == pattern(8192, 1)
    os.close(duplicate)
    mapping.close()
    return is_intact


def renew_without_one(name: str) -> list[str]:
    renewed = retrieve(name).renew(destroy=["a"])
    names = list(renewed)
    renewed.discard()
    return names


def lose_by_an_exception(name: str) -> tuple[bool, bool]:
    """Return whether a store survives an exception that takes the only object of it, twice."""

    def fail(renew: bool) -> None:
        store = retrieve(name)
        store["a"].close()
        if renew:
            store.renew().add("c", Memfd.create("c", 4096))
        raise ZeroDivisionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ZeroDivisionError):
            fail(renew=False)
        gc.collect()
        store = retrieve(name)
        is_intact = intact(store)
        del store
        with suppress(ZeroDivisionError):
            fail(renew=True)
        gc.collect()
    with LiveUpdate() as device:
        try:
            device.create_session(name).discard()
        except RequestError as error:
            exists = error.errno == 17
    return is_intact, exists


def renew_while_the_device_is_busy(name: str) -> tuple[str, bool]:
    store = retrieve(name)
    with LiveUpdate() as device:
        try:
            store.renew()
        except RequestError as error:
            error_name = type(error).__name__
        is_intact = intact(store)
        renewed = store.renew(device=device)
    renewed.discard()
    return error_name, is_intact


def preserve_half(name: str) -> OutgoingStore:
    """Create a store whose table has entries that are not preserved when the jump comes."""
    store = make(name, {"a": 4096})
    lost = Entry("b", (7,), (4096,), requires=("a",), meta={})
    needing = Entry("c", (8,), (4096,), requires=("b",), meta={})
    store._append(records.Add((lost, needing)))
    return store


def preserve_half_unsettled(name: str) -> OutgoingStore:
    """Create a store that the jump finds right after the last file is preserved."""
    store = make(name, {"a": 4096})
    with Memfd.create("b", 4096) as b:
        store.add("b", b, meta={"crc": zlib.crc32(bytes(4096))})
    assert store._contents.unsettled == {"b"}
    return store


def inspect_half(name: str) -> tuple[list[str], tuple[str, ...], bool]:
    store = retrieve(name)
    names, is_intact = list(store), intact(store)
    store.finish(destroy=names)
    return names, store.lost, is_intact


class Watched(OutgoingSession):
    """A session that records the entries of the table before each file is preserved."""

    __slots__ = ("seen", "store")
    seen: list[dict[str, bool]]
    store: OutgoingStore

    def preserve_many(self, files: Any, **keywords: Any) -> None:
        if 0 not in files:
            self.seen.append(read_entries(self.store))
        super().preserve_many(files, **keywords)


def watch(session: Watched) -> OutgoingStore:
    session.seen = []
    session.store = OutgoingStore.from_session(session)
    return session.store


def read_table(store: OutgoingStore) -> Contents:
    """Return the contents in the table itself."""
    return read_contents(lambda token: Memfd(os.dup(store._journal.memfds[token].fileno())))


def read_entries(store: OutgoingStore) -> dict[str, bool]:
    """Return the entries in the table itself, and whether it says that they are preserved."""
    read = read_table(store)
    return {name: name not in read.unsettled for name in read.entries}


def make_version_2(name: str, version: int) -> list[object]:
    """Create a store with a table of version 1 or 2, from the description of the format."""
    with LiveUpdate() as device:
        session = device.create_session(name)
    files = {"ram": (9, Memfd.create("ram", 8192)), "device": (3, Memfd.create("device", 4096))}
    entries = []
    for seed, (entry, (token, memfd)) in enumerate(files.items()):
        memfd.write(pattern(memfd.size, seed), 0)
        meta = {"crc": zlib.crc32(pattern(memfd.size, seed))}
        fields: dict[str, Any] = {"name": entry, "token": token, "meta": meta}
        if version == 2:
            requires = ["ram"] if entry == "device" else []
            fields |= {"kind": "memfd", "size": memfd.size, "requires": requires, "settled": 1}
        entries.append(fields)
        session.preserve(memfd, token)
    text = json.dumps({"meta": {"at": 1}, "entries": entries}).encode()
    header = struct.Struct("<8sIIQQ")
    check = zlib.crc32(text, zlib.crc32(header.pack(b"pyluoFDS", version, 0, 1, len(text))))
    table = Memfd.create("table", 1024)
    table.write(header.pack(b"pyluoFDS", version, check, 1, len(text)) + text, 0)
    session.preserve(table, 0)
    return [session, table, files]


def renew_version_2(name: str) -> tuple[list[str], dict[str, Any], bool]:
    store = retrieve(name)
    is_intact = intact(store)
    renewed = store.renew()
    is_current = read_table(renewed).entries == {one.name: one for one in renewed.entries}
    result = list(renewed), renewed.meta, is_intact and is_current
    renewed.discard()
    return result


class Recording(IncomingSession):
    """A session that records the order in which its files are retrieved."""

    __slots__ = ("tokens",)
    tokens: list[int]

    def retrieve(
        self,
        token: int,
        type: type[Any] = OwnedFd,  # noqa: A002
        *,
        size: int | None = None,
    ) -> Any:
        if token:
            self.tokens.append(token)
        return super().retrieve(token, type, size=size)


def make_needing(name: str) -> OutgoingStore:
    """Create a store in which an entry requires others, one of them by a thousand steps."""
    store = OutgoingStore.create(name, keeper=ALONE)
    memfds = [Memfd.create(str(number), 4096) for number in range(900)]
    chain = [
        NewEntry(str(number), memfd, requires=[str(number - 1)] if number else [])
        for number, memfd in enumerate(memfds)
    ]
    store.add_many(chain)
    for memfd in memfds:
        memfd.close()
    for entry, requires in (("a", []), ("b", []), ("c", ["b", "a"])):
        with Memfd.create(entry, 4096) as memfd:
            store.add(entry, memfd, requires=requires)
    return store


def retrieve_with_prerequisites(name: str) -> tuple[list[int], list[int]]:
    """Return the tokens in the order in which they are retrieved for two entries."""
    with LiveUpdate() as device:
        session = device.retrieve_session(name)
    recording = Recording.from_fd(session.detach(), trusted=True)
    recording.tokens = []
    store = IncomingStore(recording)
    recording.tokens.clear()
    store["c"].close()
    short = list(recording.tokens)
    recording.tokens.clear()
    store["899"].close()
    store.finish(destroy=list(store))
    return short, recording.tokens


def make_with_ram(name: str) -> OutgoingStore:
    """Create a store with a RAM of three files, of which the last one cannot be added at first."""
    store = OutgoingStore.create(name, keeper=ALONE)
    policy = NumaPolicy(NumaMode.PREFERRED, (0,)) if os.path.exists("/proc/self/numa_maps") else ()
    ram = GuestRam.create("ram", 3 * 65536 - 4096, part_size=65536, numa=policy)
    ram.write(pattern(ram.size), 0)
    with LiveUpdate() as device:
        other = device.create_session("has a part")
    other.preserve(ram.memfds[2], 1)
    with suppress(AlreadyPreservedError):
        store.add("ram", ram)
    assert list(store) == []
    other.discard()
    entry = store.add("ram", ram, meta={"at": 0})
    assert (entry.kind, entry.sizes) == ("ram", (65536, 65536, 61440))
    ram.close()
    return store


def renew_ram(name: str) -> tuple[bool, list[str], OutgoingStore]:
    """Return whether the RAM is intact, which ways to get it are refused, and the renewed store."""
    store = retrieve(name)
    refusals = []
    for wrong in (lambda: store.get("ram"), lambda: store.get_ram("table")):
        try:
            wrong()
        except (TypeError, KeyError) as error:
            refusals.append(type(error).__name__)
    with store.get_ram("ram") as ram:
        is_intact = ram.size == 3 * 65536 - 4096 and ram.read(ram.size, 0) == pattern(ram.size)
        with ram.map() as mapping:
            is_intact &= mapping[:] == pattern(ram.size)
    return is_intact, refusals, store.renew()


def describe_renewed_ram(held: tuple[bool, list[str], OutgoingStore]) -> tuple[bool, list[str]]:
    return held[:2]


def renew_what_has_grown(name: str) -> tuple[bool, bool, bool]:
    """Return whether a grown file is refused, all files are intact, and all are renewed."""
    store = retrieve(name)
    with store.get("a", Memfd) as a:
        a.resize(1 << 39)
        try:
            store.renew()
            refused = False
        except PreservedMemoryError:
            refused = not store.session.closed
        a.resize(4096)
    is_intact = intact(store)
    renewed = store.renew()
    is_renewed = read_entries(renewed) == {"a": True, "b": True}
    renewed.discard()
    return refused, is_intact, is_renewed


def renew_and_drop_half_way(name: str) -> tuple[bool, bool, bool]:
    """Return what a renewal does that cannot preserve a file at first: whether the same call again
    completes it, whether dropping it half-way warns, and whether the files stay open then.
    """
    store = retrieve(name)
    with LiveUpdate() as device:
        thief = device.create_session("thief")
    first = store["a"]

    class Interrupted(IncomingSession):
        __slots__ = ()

        def finish(self) -> None:
            super().finish()
            if not thief.closed:
                thief.preserve(first, 1)

    store._session = Interrupted.from_fd(store.session.detach(), trusted=True)
    with suppress(AlreadyPreservedError):
        store.renew()
    thief.discard()
    renewed = store.renew()
    completed = read_entries(renewed) == {"a": True, "b": True}
    renewed.discard()
    first.close()
    return completed, *drop_half_way(name)


def drop_half_way(name: str) -> tuple[bool, bool]:
    store = OutgoingStore.create(name, keeper=ALONE)
    with Memfd.create("a", 4096) as a:
        entry = Entry("a", (1,), (4096,))
        files = iter([(1, OwnedFd(os.dup(a.fileno())))])
        store.prepare_renewal([entry], {}, files, None, 0.0)
    waiting = store._waiting
    assert waiting is not None
    fd = waiting.fileno()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store, waiting
        gc.collect()
    warned = any("in the middle of a renewal" in str(each.message) for each in caught)
    os.fstat(fd)
    os.close(fd)
    return warned, True
