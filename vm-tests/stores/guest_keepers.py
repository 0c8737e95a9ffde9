"""The guest's part of the tests of keepers. Imports only pyluo and the standard library."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import zlib
from typing import TYPE_CHECKING, Any

from sessions.guest_files import pattern

import pyluo
from pyluo import (
    HolderProcess,
    IncomingSession,
    IncomingStore,
    LiveUpdate,
    Memfd,
    OutgoingSession,
    OutgoingStore,
    OwnedFd,
    RequestError,
    SessionExistsError,
    SessionNotFoundError,
    StoreError,
)
from pyluo.keepers.holder import _address
from pyluo.keepers.parcel import Parcel
from pyluo.open_sessions import open_sessions, require_sessions
from pyluo.stores.kept import label_of_this_boot
from stores.guest_store import intact, read_table

if TYPE_CHECKING:
    from types import FrameType

PACKAGE = os.path.dirname(pyluo.__file__)


def make(name: str, files: int = 2) -> None:
    """Create a store that only the keeper has afterwards."""
    store = OutgoingStore.create(name)
    fill(store, files)
    store.close()


def fill(store: OutgoingStore, files: int) -> None:
    for number in range(len(store), files):
        with Memfd.create("file", 4096) as file:
            file.write(pattern(4096, number), 0)
            meta = {"crc": zlib.crc32(pattern(4096, number))}
            requires = [str(number - 1)] if number else []
            store.add(str(number), file, requires=requires, meta=meta)


def holders() -> list[str]:
    return sorted(str(each.session) for each in open_sessions() if each.command == "pyluo-holder")


def use_a_holder() -> list[Any]:
    """Return what happens to descriptors that a holder keeps, step by step."""
    keeper = HolderProcess()
    seen: list[Any] = [keeper.kept("a"), keeper.describe("a")]
    with Memfd.create("one", 1) as one, Memfd.create("two", 2) as two:
        keeper.keep("a", "x", one)
        keeper.keep("a", "y", one)
        keeper.keep("a", "x", two)  # replaces the first one
        keeper.keep("b/c:\udcff", "x", one)
    kept = keeper.kept("a")
    seen.append({label: os.fstat(fd.fileno()).st_size for label, fd in kept.items()})
    for fd in (*kept.values(), *keeper.kept("b/c:\udcff").values()):
        fd.close()
    keeper.release("a", "no such label")
    keeper.release("a", "x")
    keeper.release("a", "y")
    seen += [keeper.kept("a"), keeper.describe("a")]
    keeper.release("a", "y")
    keeper.release("b/c:\udcff", "x")
    seen.append(os.listdir("/run/pyluo"))
    return seen


def hold_without_an_interpreter() -> list[Any]:
    """Return the errors of holders where sys.executable, or what is named, is no interpreter."""
    python, sys.executable = sys.executable, ""
    seen: list[Any] = []
    try:
        with Memfd.create("one", 1) as one:
            for keeper in (HolderProcess(), HolderProcess(python="/no/python")):
                try:
                    keeper.keep("e", "x", one)
                except RequestError as error:
                    seen.append((error.errno, str(error)))
            keeper = HolderProcess(python=python)
            keeper.keep("e", "x", one)
    finally:
        sys.executable = python
    for fd in (kept := keeper.kept("e")).values():
        fd.close()
    keeper.release("e", "x")
    return [*seen, list(kept)]


def create_open_and_discard() -> list[Any]:
    """Return what happens to a store that one object after the other has."""
    make("s")
    seen: list[Any] = [holders()]
    try:
        OutgoingStore.create("s")
    except RequestError as error:
        seen.append(str(error))
    store = OutgoingStore.open("s")
    seen.append(list(store))
    fill(store, 700)  # needs another segment of the table
    gc.disable()  # a dropped store ends at once
    del store
    gc.enable()
    store = OutgoingStore.open("s")
    seen += [len(store), read_table(store).entries == {e.name: e for e in store.entries}]
    try:
        OutgoingStore.open("t")
    except SessionNotFoundError as error:
        seen.append(str(error))
    require_sessions(["s"])
    store.discard()
    try:
        require_sessions(["s"])
    except SessionNotFoundError as error:
        seen.append(error.subject)
    seen.append(holders())
    with LiveUpdate() as device:
        device.create_session("s").discard()
    return seen


def take_over_what_a_dead_process_was_adding(name: str) -> list[str]:
    """Kill a process after it wrote an entry down and before it preserved the file."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        store = OutgoingStore.create(name)
        fill(store, 1)
        OutgoingSession.preserve_many = die  # type: ignore[method-assign]
        fill(store, 2)

    run_in_child(run)
    store = OutgoingStore.open(name)
    found = list(store)
    fill(store, 2)
    store.close()
    return found


def run_in_child(function: object) -> bool:
    """Run a function in a process; return whether it was killed by SIGKILL."""
    pid = os.fork()
    if not pid:
        try:
            function()  # type: ignore[operator]
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status > 0:
        raise AssertionError("the process failed")
    return status == -signal.SIGKILL


def make_for_renewals(count: int) -> None:
    for number in range(count):
        make(f"renew {number}")


def kill_renewals(count: int) -> tuple[int, dict[str, int]]:
    """Kill processes at lines all over `renew`, and take over what they leave.

    Returns:
        The number of processes that were killed, and how often each way of taking over was needed.
    """
    ways = {"retrieved": 0, "opened": 0}
    lines = renew_and_die("renew 0", 0)
    for number in range(1, count):
        name, last = f"renew {number}", (number - 1) * lines // (count - 1)
        assert run_in_child(lambda: renew_and_die(name, 1 + last))  # noqa: B023
        try:
            store = IncomingStore.retrieve(name)
        except SessionNotFoundError:
            OutgoingStore.open(name).close()
            ways["opened"] += 1
        else:
            try:
                OutgoingStore.open(name)
                raise AssertionError("opened, although the incoming store is there")
            except (StoreError, SessionNotFoundError):
                pass
            assert intact(store)
            store.renew().close()
            ways["retrieved"] += 1
    return count - 1, ways


def renew_and_die(name: str, number: int) -> int:
    """Renew a store; die before the line of this number; return how many lines there are."""
    lines = 0

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines += event == "line"
        if number and lines == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    store = IncomingStore.retrieve(name)
    sys.settrace(trace)  # type: ignore[arg-type]
    renewed = store.renew()
    sys.settrace(None)
    renewed.close()
    return lines


def check_renewals(count: int) -> int:
    """Return how many stores are as they were."""
    good = 0
    for number in range(count):
        store = IncomingStore.retrieve(f"renew {number}")
        good += list(store) == ["0", "1"] and intact(store) and not store.lost
        store.finish(destroy=list(store))
    return good


def kill_holder(name: str) -> None:
    pid = int(HolderProcess().describe(name).removeprefix("process "))
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def lose_the_holder() -> tuple[list[str], bool]:
    """Return what a process that lost its holder still has, and whether it can have a new one."""
    store = OutgoingStore.create("s")
    kill_holder("s")
    fill(store, 700)  # a new segment of the table is kept by a new holder
    names = list(read_table(store).entries)
    del store
    again = OutgoingStore.open("s")
    found = len(again) == 700
    again.discard()
    return names[:2], found


def write_from_two_objects() -> tuple[int | None, list[str]]:
    """Return the refusal of the object that another one has overtaken, and what the table has."""
    first = OutgoingStore.create("s")
    second = OutgoingStore.open("s")
    fill(second, 1)
    try:
        fill(first, 1)
        refusal = None
    except StoreError as error:
        refusal = error.errno
    fill(second, 2)
    names = list(read_table(second).entries)
    second.discard()
    return refusal, names


def close_without_the_holder() -> list[str]:
    """Return what can be taken over from a store that was closed when its holder was dead."""
    store = OutgoingStore.create("s")
    fill(store, 1)
    kill_holder("s")
    store.close()
    again = OutgoingStore.open("s")
    names = list(again)
    again.discard()
    return names


def send_odd_requests() -> int:
    """Return how many descriptors a holder still has after requests that make no sense."""
    keeper = HolderProcess()
    with Memfd.create("a", 1) as a:
        keeper.keep("s", "x", a)
        for packet in (
            b"x",
            b"[]",
            b'["keep", "y", null]',
            b'["retrieve", "y", null]',
            b'["z",1,2]',
        ):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(_address("s"))
                socket.send_fds(client, [packet], [a.fileno()] if b"z" in packet else [])
                client.recv(1 << 16)
    kept = keeper.kept("s")
    for fd in kept.values():
        fd.close()
    keeper.release("s", "x")
    return len(kept)


def renew_beside_another_store(name: str) -> tuple[str, bool, list[str]]:
    """Return the refusal to renew a store while the keeper has a new one of its name; both."""
    incoming = IncomingStore.retrieve(name)
    make(name, 1)
    try:
        incoming.renew()
        refusal = ""
    except SessionExistsError as error:
        refusal = type(error).__name__
    is_intact = intact(incoming)
    other = OutgoingStore.open(name)
    names = list(other)
    other.discard()
    incoming.renew().discard()
    return refusal, is_intact, names


def make_no_store(name: str) -> OutgoingSession:
    with LiveUpdate() as device, Memfd.create("file", 4096) as file:
        session = device.create_session(name)
        session.preserve(file, 2)
    return session


def take_the_session_from_the_refusal(name: str) -> int:
    """Return the size of a file in a session that is no store, after only the session is left."""

    def refused() -> IncomingSession:
        try:
            IncomingStore.retrieve(name)
        except StoreError as error:
            session: IncomingSession = error.session
            return session
        raise AssertionError

    session = refused()
    gc.collect()
    with session.retrieve(2, Memfd) as file:
        size = file.size
    session.finish()
    HolderProcess().release(name, label_of_this_boot("incoming"))
    return size


def pack(count: int) -> int:
    """Return how many files in flight a parcel of this many files has, in a guest."""
    files = ((token, OwnedFd(os.memfd_create("a"))) for token in range(count))
    with Parcel.pack(files, count) as parcel:
        return sum(len(batch) for batch in parcel.unpack())


def list_and_finish(name: str) -> tuple[list[str], bool]:
    store = IncomingStore.retrieve(name)
    names, is_intact = list(store), intact(store)
    store.finish(destroy=names)
    return names, is_intact
