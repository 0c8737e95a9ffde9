"""What the tests of descriptor stores run in the guest; imports nothing but pyluo and stdlib."""

from __future__ import annotations

import zlib
from typing import Any

from pyluo import FdStore, FdStoreError, IncomingSession, LiveUpdate, LuoError, Memfd

FILES = 40
SIZE = (64 << 20) // FILES


def fill(seed: int, size: int) -> bytes:
    """Bytes that are another for each seed, and cost little to make."""
    page = b"".join((seed * 1000003 + i).to_bytes(8, "little") for i in range(512))
    return (page * (size // len(page) + 1))[:size]


def make(name: str, sizes: dict[str, int]) -> FdStore:
    store = FdStore.create(name)
    for number, (entry, size) in enumerate(sizes.items()):
        with Memfd.create(entry, size) as memfd:
            memfd.write(fill(number, size), 0)
            store.add(entry, memfd, meta={"crc": zlib.crc32(fill(number, size))})
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
    whole = intact(store)
    names = list(store)
    store.renew()
    return store, names, whole


def report(held: tuple[FdStore, list[str], bool]) -> tuple[list[str], bool]:
    return held[1], held[2]


def make_linked() -> FdStore:
    """RAM, a device that needs it, and a log; with tokens in another order than the entries."""
    store = make("linked", {"gone": 4096, "ram": 8192})
    store.set_meta({"vm": "vm0", "layout": [1, 2]})
    with Memfd.create("device", 4096) as device:
        store.add("device", device, requires=["ram"], meta={"crc": zlib.crc32(bytes(4096))})
    with Memfd.create("log", 4096) as log:
        store.add("log", log, meta={"crc": zlib.crc32(bytes(4096))})
    store.remove("gone")
    return store


def look_at_linked() -> dict[str, Any]:
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
    """Writes over the table of a store that is about to jump."""
    table = store._table
    assert table is not None
    if damage == "nonsense":
        table.memfd.write(b"\x5a" * table.memfd.size, 0)
    else:  # a table of the next version, as a newer pyluo would leave it
        from pyluo import contents

        contents.VERSION += 1
        table.write(store._contents())
        contents.VERSION -= 1


def make_spoiled(damages: dict[str, str]) -> list[FdStore]:
    stores = make_many(list(damages))
    for store, damage in zip(stores, damages.values(), strict=True):
        spoil(store, damage)
    return stores


def retrieve_spoiled(name: str) -> tuple[int | None, str, bool]:
    """The errno and the text of the refusal; whether the files can still be had by their tokens."""
    try:
        FdStore.retrieve(name)
    except FdStoreError as error:
        session = error.session
        assert isinstance(session, IncomingSession)
        with session, session.retrieve(2, Memfd) as memfd:
            return error.errno, str(error), memfd.read(8192, 0) == fill(1, 8192)
    return None, "", False


def finish_without_one(name: str) -> tuple[bool, bool]:
    """Whether a finish that names what is destroyed passes, and one that names too little not."""
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
    """Whether a store that was retrieved keeps its files when an exception leaves its block."""
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
    """Whether leaving the block refuses to destroy, and whether all of it can be had then."""
    store = FdStore.retrieve(name)
    try:
        with store:
            pass
    except FdStoreError:
        refused = True
    else:
        refused = False
    whole = intact(store)
    store.finish()
    return refused, whole


def renew_while_the_device_is_busy(name: str) -> tuple[str, bool]:
    store = FdStore.retrieve(name)
    with LiveUpdate() as device:
        try:
            store.renew()
        except LuoError as error:
            told = type(error).__name__
        store.renew(device=device)
    whole = intact(store)
    store.discard()
    return told, whole


def preserve_half(name: str) -> FdStore:
    """A store whose table announces two files, of which one is in when the jump comes."""
    store = make(name, {"a": 4096})
    table, entry = store._table, store._entries["a"]
    assert table is not None
    from dataclasses import replace

    from pyluo.contents import Contents

    announced = replace(entry, name="b", token=7, settled=False, requires=("a",))
    needing = replace(entry, name="c", token=8, settled=False, requires=("b",))
    table.write(Contents((replace(entry, settled=False), announced, needing)))
    return store


def look_at_half(name: str) -> tuple[list[str], tuple[str, ...], bool]:
    store = FdStore.retrieve(name)
    names, whole = list(store), intact(store)
    store.finish()
    return names, store.lost, whole
