"""The guest's part of the state machine of stores. Imports only pyluo and the standard library."""

from __future__ import annotations

import gc
import os
import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

from pyluo import (
    IncomingStore,
    Memfd,
    NewEntry,
    OutgoingStore,
    RequestError,
    SessionNotFoundError,
    SessionRetrievedError,
)
from pyluo.open_sessions import open_sessions
from stores.guest_interrupted import interrupt
from stores.guest_store import ALONE, read_table

SIZE = 4096

stores: dict[str, OutgoingStore | IncomingStore] = {}
open_files: dict[tuple[str, str], Memfd] = {}

# A new entry: its name, its content, the names that it requires, and its metadata.
New = tuple[str, int, list[str], dict[str, Any]]
Answer = tuple[str, Any]


def clear(names: list[str]) -> None:
    """End all stores and sessions that an earlier run left."""
    for each in open_sessions():  # a step that failed may have left the device open
        if each.pid == os.getpid() and each.session is None:
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), each.fd)  # its owner may close the number later
    for file in open_files.values():
        file.close()
    open_files.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            store = stores.pop(name, None)
            if store is None or store.closed:
                try:
                    store = IncomingStore.retrieve(name, keeper=ALONE)
                except (SessionNotFoundError, SessionRetrievedError):
                    continue
            if isinstance(store, OutgoingStore):
                store.discard()
            else:
                store.finish(destroy=list(store))
        gc.collect()
    for each in open_sessions():  # of objects that were dropped
        if each.pid == os.getpid() and each.session in names:
            os.close(each.fd)


def attempt(operation: str, name: str, *arguments: Any, interrupted_at: int = 0) -> Answer:
    """Make a request, after an attempt that is interrupted before a line; return the answer."""
    action = partial(globals()[f"do_{operation}"], name, *arguments)
    try:
        if interrupted_at:
            before = stores.get(name)
            was_interrupted = interrupt(partial(remember, action), interrupted_at)
            # Whatever the interruption was in the midst of: all others would be kept out.
            assert not has_device_open(), (operation, name, interrupted_at, was_interrupted)
            if not was_interrupted:
                return last[0]
            if before is not None:
                stores[name] = before
        return "done", action()
    except (RequestError, KeyError) as error:
        return type(error).__name__, getattr(error, "errno", None)
    finally:
        assert not has_device_open(), (operation, name)


def has_device_open() -> bool:
    return any(each.session is None and each.pid == os.getpid() for each in open_sessions())


last: list[Answer] = [("", None)]


def remember(action: partial[Any]) -> None:
    try:
        last[0] = "done", action()
    except (RequestError, KeyError) as error:
        last[0] = type(error).__name__, getattr(error, "errno", None)


def do_create(name: str) -> None:
    stores[name] = OutgoingStore.create(name, keeper=ALONE)


def do_retrieve(name: str) -> Any:
    store = IncomingStore.retrieve(name, keeper=ALONE)
    stores[name] = store
    return describe(store), store.lost


def outgoing(name: str) -> OutgoingStore:
    store = stores[name]
    assert isinstance(store, OutgoingStore)
    return store


def incoming(name: str) -> IncomingStore:
    store = stores[name]
    assert isinstance(store, IncomingStore)
    return store


def do_add(name: str, new: list[New]) -> None:
    entries = []
    for entry, content, requires, meta in new:
        file = source_file(content)
        entries.append(NewEntry(entry, file, requires, meta))
    if len(entries) == 1:
        [one] = entries
        outgoing(name).add(one.name, one.file, requires=one.requires, meta=one.meta)
    else:
        outgoing(name).add_many(entries)


def source_file(content: int) -> Memfd:
    """Return the file of this content, which the same request again finds again."""
    key = "source", str(content)
    if key not in open_files:
        with ExitStack() as stack:
            file = stack.enter_context(Memfd.create("file", SIZE))
            file.write(content.to_bytes(8, "little") * (SIZE // 8), 0)
            # In one line: an attempt that is interrupted must leave no file without its content.
            open_files[key] = file; stack.pop_all()  # noqa: E702  # fmt: skip
    return open_files[key]


def do_set_meta(name: str, meta: dict[str, Any], entry: str | None) -> None:
    outgoing(name).set_meta(meta, name=entry)


def do_remove(name: str, names: list[str]) -> None:
    outgoing(name).remove(*names)


def do_discard(name: str) -> None:
    outgoing(name).discard()


def do_renew(name: str, destroy: list[str]) -> None:
    store = incoming(name)
    stores[name] = store.renew(destroy=destroy)


def do_finish(name: str, destroy: list[str]) -> None:
    incoming(name).finish(destroy=destroy)


def do_get(name: str, entry: str, keep_open: bool) -> int:
    file = incoming(name).get(entry, Memfd)
    content = int.from_bytes(file.read(8, 0), "little")
    assert file.read(SIZE, 0) == content.to_bytes(8, "little") * (SIZE // 8)
    if keep_open:
        open_files[name, entry] = file
    else:
        file.close()
    return content


def do_look(name: str) -> Any:
    """Return the contents of a store; for an outgoing one, also those in the table itself."""
    store = stores[name]
    if isinstance(store, OutgoingStore):
        read = read_table(store)
        assert tuple(read.entries.values()) == store.entries
        assert read.meta == store.meta
        assert all(store.session.has(token) for each in store.entries for token in each.tokens)
    return describe(store)


def describe(store: OutgoingStore | IncomingStore) -> Any:
    return [(each.name, each.requires, each.meta) for each in store.entries], store.meta


def drop(name: str) -> None:
    """Drop the only object of a store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del stores[name]
        gc.collect()


def forget_after_jump() -> None:
    stores.clear()
    open_files.clear()
