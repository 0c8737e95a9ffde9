"""Calls of a store that an exception interrupts, before each line or before every `step` lines.

Imports only pyluo and the standard library.
"""

from __future__ import annotations

import os
import resource
import sys
import zlib
from functools import partial
from itertools import count
from opcode import opmap
from types import FunctionType
from typing import TYPE_CHECKING

from sessions.guest_files import pattern

import pyluo
from pyluo import (
    IncomingStore,
    Keeper,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    NewEntry,
    OutgoingStore,
    OwnedFd,
    RequestError,
)
from stores.guest_store import ALONE, intact, read_entries

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from pyluo.descriptor import HasFileno


class Shelf(Keeper):
    """A keeper in the same process: what it does itself is not interrupted."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], OwnedFd] = {}

    def keep(self, name: str, label: str, fd: HasFileno) -> None:
        before = self.files.pop((name, label), None)
        self.files[name, label] = OwnedFd(os.dup(fd.fileno()))
        if before is not None:
            before.close()

    def kept(self, name: str) -> dict[str, OwnedFd]:
        return {
            label: OwnedFd(os.dup(fd.fileno()))
            for (each, label), fd in self.files.items()
            if each == name
        }

    def release(self, name: str, label: str) -> None:
        if (fd := self.files.pop((name, label), None)) is not None:
            fd.close()

    def describe(self, name: str) -> str:
        return "this process"


SHELF = [each.__code__ for each in vars(Shelf).values() if isinstance(each, FunctionType)]
keeper: Keeper | KeeperChoice = ALONE
PACKAGE = os.path.dirname(pyluo.__file__)
_PUSH_EXC_INFO = opmap["PUSH_EXC_INFO"]
TEXT = "y" * 40_000  # as metadata, it needs a new segment of the table


class Interrupted(BaseException):
    """What a signal handler raises."""


def interrupt(action: Callable[[], object], number: int) -> bool:
    """Run an action, and raise before the line of pyluo that comes at this number.

    Returns:
        Whether the action was interrupted; False if it has fewer lines.
    """
    lines = 0
    interrupted = False

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            lines += 1
            if lines >= number and not is_spared(frame) and not is_out_of_reach(frame):
                sys.settrace(None)
                raise Interrupted
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        action()
    except Interrupted:
        interrupted = True
    finally:
        sys.settrace(None)
    return interrupted


def is_spared(frame: FrameType | None) -> bool:
    """Return whether a frame belongs to the shelf, or to a `__del__`.

    The shelf stands for another process, and Python ignores exceptions in a `__del__`.
    """
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code in SHELF:
            return True
        frame = frame.f_back
    return False


def is_out_of_reach(frame: FrameType) -> bool:
    """Return whether a frame is about to handle an exception, where no signal handler can run.

    CPython (3.11 to 3.13) loses the exception, with all that its frames refer to, if a trace
    function raises there: where the line of a ``with`` comes again because its block has raised.
    """
    return frame.f_code.co_code[frame.f_lasti] == _PUSH_EXC_INFO


def use_a_shelf() -> None:
    global keeper
    keeper = Shelf()


def retrieve(name: str) -> IncomingStore:
    return IncomingStore.retrieve(name, keeper=keeper)


def allow_many_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100_000, 100_000))


def with_file(seed: int) -> tuple[Memfd, dict[str, int]]:
    memfd = Memfd.create("file", 4096)
    memfd.write(pattern(4096, seed), 0)
    return memfd, {"crc": zlib.crc32(pattern(4096, seed))}


def make(name: str) -> OutgoingStore:
    store = OutgoingStore.create(name, keeper=keeper)
    file, meta = with_file(1)
    with file:
        store.add("first", file, meta=meta)
    return store


def interrupt_creation(step: int) -> int:
    """Interrupt `create`, and call it again; return how many lines it has."""
    for number in count(1, step):
        created: list[OutgoingStore] = []
        create = partial(OutgoingStore.create, "s", keeper=keeper)
        if not interrupt(lambda: created.append(create()), number):  # noqa: B023
            created[0].discard()
            return number
        OutgoingStore.create("s", keeper=keeper).discard()
        with LiveUpdate() as device:  # it is closed, and the name is free
            device.create_session("s").discard()
    raise AssertionError


def interrupt_additions(step: int, go_on: bool) -> list[OutgoingStore]:
    """Interrupt `add`; then either call it again, or go on with another file.

    The stores are named "add 1" and so on, or "go on 1" and so on.
    """
    stores: list[OutgoingStore] = []
    for number in count(1, step):
        store = make(f"{'go on' if go_on else 'add'} {number}")
        file, meta = with_file(2)
        other, other_meta = with_file(3)
        with file, other:
            interrupted = interrupt(partial(store.add, "second", file, meta=meta), number)
            if interrupted and not go_on:
                store.add("second", file, meta=meta)
            store.add("third", other, meta=other_meta)
        seen = read_entries(store)
        assert list(seen) in (["first", "second", "third"], ["first", "third"][: 2 * go_on])
        for entry in store.entries:
            assert all(store.session.has(token) for token in entry.tokens)
        stores.append(store)
        if not interrupted:
            return stores
    raise AssertionError


def interrupt_additions_of_many(step: int) -> list[OutgoingStore]:
    """Interrupt `add_many`, and call it again; the stores are named "many 1" and so on."""
    stores: list[OutgoingStore] = []
    for number in count(1, step):
        store = make(f"many {number}")
        files = [with_file(seed) for seed in range(3)]
        new = [NewEntry(str(seed), file, meta=meta) for seed, (file, meta) in enumerate(files)]
        interrupted = interrupt(partial(store.add_many, new), number)
        if interrupted:
            assert [entry.name for entry in store.add_many(new)] == ["0", "1", "2"]
        assert read_entries(store) == dict.fromkeys(["first", "0", "1", "2"], True)
        for file, _ in files:
            file.close()
        stores.append(store)
        if not interrupted:
            return stores
    raise AssertionError


def interrupt_changes(step: int) -> list[OutgoingStore]:
    """Interrupt `set_meta` with a new segment, and `remove`.

    The stores are named "change 1" and so on.
    """
    stores: list[OutgoingStore] = []
    pending = True
    for number in count(1, step):
        store = make(f"change {number}")
        file, meta = with_file(2)
        with file:
            store.add("gone", file, meta=meta)
        store.set_meta({"text": TEXT})
        more = {"text": TEXT, "number": number}
        pending = interrupt(partial(store.set_meta, more), number)
        if pending:
            store.set_meta(more)
        if interrupt(partial(store.remove, "gone"), number):
            store.remove("gone")
        assert read_entries(store) == {"first": True}
        stores.append(store)
        if not pending:
            return stores
    raise AssertionError


def interrupt_discards(step: int) -> int:
    for number in count(1, step):
        store = make("s")
        interrupted = interrupt(store.discard, number)
        store.discard()
        with LiveUpdate() as device:
            device.create_session("s").discard()
        if not interrupted:
            return number
    raise AssertionError


def make_for_renewals(step: int, lines: int) -> list[OutgoingStore]:
    return [make(f"renew {number}") for number in range(1, lines + 1, step)]


def interrupt_retrievals(step: int, prefix: str, stores: int, names: list[str]) -> int:
    """Interrupt `retrieve`, and call it again; check what came over; return how many were."""
    interruptions = 0
    for number in range(1, 1 + stores * step, step):
        name = f"{prefix} {number}"
        found: list[IncomingStore] = []
        if interrupt(lambda: found.append(retrieve(name)), number):  # noqa: B023
            interruptions += 1
            store = retrieve(name)
            assert [*store] == names or (prefix == "go on" and [*store] == ["first", "third"])
            assert store.lost == ()
            assert intact(store)
            if prefix == "change":
                assert store.meta == {"text": TEXT, "number": number}
            store.finish(destroy=list(store))
    return interruptions


def interrupt_renewals(step: int, lines: int) -> list[OutgoingStore]:
    """Interrupt `renew`, and call it again."""
    renewed: list[OutgoingStore] = []
    for number in range(1, lines + 1, step):
        store = retrieve(f"renew {number}")
        interrupted = interrupt(store.renew, number)
        outgoing = store.renew()
        assert read_entries(outgoing) == {"first": True}
        assert store.session.closed
        renewed.append(outgoing)
        if not interrupted:
            return renewed
    raise AssertionError(f"a renewal has more than {lines} lines")


def interrupt_finishes(step: int, renewed: int) -> int:
    """Check the stores that were renewed; interrupt `finish`, and call it again."""
    for number in range(1, 1 + renewed * step, step):
        store = retrieve(f"renew {number}")
        assert store.lost == ()
        assert intact(store)
        file = store.get("first", Memfd)
        interrupted = interrupt(store.finish, number)
        store.finish()
        assert store.session.closed
        assert file.read(4096, 0) == pattern(4096, 1)
        file.close()
        try:
            retrieve(f"renew {number}")
        except RequestError:
            continue
        raise AssertionError(f"interrupted: {interrupted}")
    return renewed


def length(stores: list[OutgoingStore]) -> int:
    return len(stores)
