"""Tests of stores: before a jump, over one, and over many."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest
from sessions import guest_files

from pyluo import (
    AlreadyPreservedError,
    DeviceBusyError,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    NewEntry,
    NotPreservableError,
    OutgoingStore,
    SessionExistsError,
    StoreError,
    TokenInUseError,
)
from pyluo.errors import RequestError, SealedError
from pyluo.vm import VM
from stores import guest_store
from stores.guest_store import ALONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

HOPS = int(os.environ.get("PYLUO_STORE_HOPS", "12"))
NAMES = [f"s{number}" for number in range(8)]
SPOILED = ["nonsense", "newer", "a record"]


def test_a_store_is_renewed_hop_after_hop_and_nothing_is_lost(kernel: Kernel) -> None:
    with VM(kernel) as vm:
        vm.hold(guest_store.make_forty)
        for hop in range(1, HOPS + 1):
            vm.live_update()
            held = vm.hold(guest_store.renew_forty)
            names, is_intact = vm.call(guest_store.get_renewal_result, held)
            assert is_intact, f"hop {hop}"
            assert names == [f"part {number}" for number in range(guest_store.FILES)]
            assert vm.updates == hop


def test_order_prerequisites_and_metadata_come_along(vm: VM) -> None:
    vm.hold(guest_store.make_linked)
    vm.live_update()
    result = vm.call(guest_store.inspect_linked)
    assert result["names"] == ["ram", "device", "log"]
    assert result["meta"] == {"vm": "vm0", "layout": [1, 2]}
    assert result["lost"] == ()
    # The device is open; the RAM before it was retrieved, and is not.
    assert "entries ['ram', 'log'], which this process has neither open" in result["refusal"]
    assert result["whole"]
    assert result["closed"]


def test_a_ram_of_several_files_is_one_entry_over_two_jumps(vm: VM) -> None:
    vm.hold(guest_store.make_with_ram, "ram")
    for _ in range(2):
        vm.live_update()
        held = vm.hold(guest_store.renew_ram, "ram")
        assert vm.call(guest_store.describe_renewed_ram, held) == (True, ["TypeError", "KeyError"])


@pytest.fixture(scope="module")
def landed(kernel: Kernel) -> Iterator[VM]:
    with VM(kernel) as vm:
        vm.hold(guest_store.make_many, NAMES)
        vm.hold(guest_store.make_spoiled, SPOILED)
        vm.hold(guest_store.preserve_half, "half")
        vm.hold(guest_store.preserve_half_unsettled, "unsettled")
        vm.hold(session_without_a_table)
        vm.hold(guest_store.make_version_2, "version 1", 1)
        vm.hold(guest_store.make_version_2, "version 2", 2)
        vm.hold(guest_store.make_needing, "needs")
        vm.live_update()
        yield vm


def session_without_a_table() -> object:
    with LiveUpdate() as device, Memfd.create("b", 8192) as memfd:
        session = device.create_session("plain")
        memfd.write(guest_files.pattern(8192, 1), 0)
        session.preserve(memfd, 2)
    return session


def test_a_finish_destroys_only_what_it_names_even_if_it_was_once_got(landed: VM) -> None:
    untouched, closed, open_ = landed.call(guest_store.finish_without_one, "s0")
    assert "['a', 'b']" in untouched
    assert "['a']" in closed
    assert open_ == ""


def test_a_finish_takes_a_duplicate_or_a_mapping_for_a_file_in_use(landed: VM) -> None:
    assert landed.call(guest_store.finish_what_is_in_use, "s7")


def test_a_renewal_can_leave_an_entry_behind(landed: VM) -> None:
    assert landed.call(guest_store.renew_without_one, "s1") == ["b"]


def test_an_exception_costs_a_store_nothing_even_renewed(landed: VM) -> None:
    assert landed.call(guest_store.lose_by_an_exception, "s2") == (True, True)


def test_a_renewal_without_the_device_touches_nothing(landed: VM) -> None:
    assert landed.call(guest_store.renew_while_the_device_is_busy, "s4") == (
        "DeviceBusyError",
        True,
    )


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("nonsense", errno.EBADMSG, "neither of its two slots is valid"),
        ("a record", errno.EBADMSG, "checksum"),
        ("newer", errno.EPROTONOSUPPORT, "version 4, where this pyluo reads up to 3"),
        ("plain", errno.ENOENT, "no table of contents"),
    ],
)
def test_a_table_that_cannot_be_read_finishes_nothing(
    landed: VM, name: str, number: int, text: str
) -> None:
    error_number, message, rescued = landed.call(guest_store.retrieve_spoiled, name)
    assert error_number == number
    assert text in message
    assert rescued


def test_a_jump_in_the_middle_of_preserving_is_told_entry_by_entry(landed: VM) -> None:
    assert landed.call(guest_store.inspect_half, "half") == (["a"], ("b", "c"), True)


def test_a_jump_right_after_preserving_loses_nothing(landed: VM) -> None:
    assert landed.call(guest_store.inspect_half, "unsettled") == (["a", "b"], (), True)


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_table_is_read_and_renewed_in_its_order(landed: VM, version: int) -> None:
    """The tokens of these tables are not in the order of their entries."""
    names, meta, is_intact = landed.call(guest_store.renew_version_2, f"version {version}")
    assert names == ["ram", "device"]
    assert meta == {"at": 1}
    assert is_intact


def test_what_an_entry_requires_is_retrieved_before_it(landed: VM) -> None:
    short, long = landed.call(guest_store.retrieve_with_prerequisites, "needs")
    assert short == [901, 902, 903]
    assert long == list(range(1, 901))


def test_a_renewal_refuses_what_has_grown_before_it_gives_anything_up(landed: VM) -> None:
    assert landed.call(guest_store.renew_what_has_grown, "s6") == (True, True, True)


def test_a_renewal_that_cannot_preserve_keeps_the_files_and_is_completed(landed: VM) -> None:
    assert landed.call(guest_store.renew_and_drop_half_way, "s5") == (True, True, True)


@pytest.mark.in_guest
def test_a_store_refuses_what_would_not_come_back() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096, executable=False) as noexec:
        store.add("a", a)
        with pytest.raises(StoreError) as caught:
            store.add("a", noexec)
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(StoreError) as caught:
            store.add("b", noexec, requires=["c"])
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(NotPreservableError):
            store.add("b", noexec)
        with pytest.raises(AlreadyPreservedError):
            store.add("b", a)
        with pytest.raises(RequestError) as bad:
            store.add("b", 1000)
        assert bad.value.errno == errno.EBADF
        with pytest.raises(TypeError):
            store.add("b", noexec, meta={"x": object()}, allow_noexec=True)
        with pytest.raises(TypeError):
            store.add("", noexec, allow_noexec=True)
        assert list(store) == ["a"]
        assert guest_store.read_entries(store) == {"a": True}
        store.add("b", noexec, requires=["a"], allow_noexec=True)
        with pytest.raises(StoreError) as caught:
            store.remove("a")
        assert caught.value.errno == errno.EBUSY
    store.discard()


@pytest.mark.in_guest
def test_metadata_is_before_the_jump_what_it_will_be_after_it() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    with Memfd.create("a", 4096) as a:
        entry = store.add("a", a, meta={"pair": (1, (2, 3))})
    assert entry.meta == {"pair": [1, [2, 3]]}
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    bad_ones: list[Any] = [
        {1: "x"}, {"deep": {2: "x"}}, {"x": {3}}, {"x": float("nan")}, cycle
    ]  # fmt: skip
    for bad in bad_ones:
        with pytest.raises((TypeError, ValueError)):
            store.set_meta(bad)
        with pytest.raises((TypeError, ValueError)):
            store.set_meta(bad, name="a")
    assert store.meta == {}
    meta = {"list": [1]}
    store.set_meta(meta)
    meta["list"].append(2)
    assert store.meta == {"list": [1]} == guest_store.read_table(store).meta
    store.discard()


@pytest.mark.in_guest
def test_a_failed_add_leaves_no_descriptor_and_no_entry() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    before = len(os.listdir("/proc/self/fd"))
    event = os.eventfd(0)
    with pytest.raises(NotPreservableError):
        store.add("event", event)
    os.close(event)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "event" not in store
    store.discard()


@pytest.mark.in_guest
def test_a_store_keeps_no_descriptor_of_its_files() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        with Memfd.create("a", 4096) as a:
            store.add(str(number), a)
    assert len(os.listdir("/proc/self/fd")) == before
    store.discard()


@pytest.mark.in_guest
def test_a_table_grows_and_does_not_grow_when_the_same_metadata_is_written_often() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    with Memfd.create("a", 4096) as a:
        store.add("a", a, meta={"text": "x" * 100_000})
    for number in range(50):
        store.set_meta({"number": number, "text": "y" * 40_000})
        assert guest_store.read_table(store).meta["number"] == number
    sizes = [memfd.size for memfd in store._journal.memfds.values()]
    assert sum(sizes) < 2 << 20  # 2 MB were written, of which 140 kB count
    assert guest_store.read_entries(store) == {"a": True}
    assert guest_store.read_table(store).entries == {"a": store.entries[0]}
    store.discard()


@pytest.mark.in_guest
def test_a_removed_entry_is_gone_from_the_table_and_its_file_can_be_added_again() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b:
        store.add("a", a)
        store.add("b", b)
        store.remove("a")
        assert guest_store.read_entries(store) == {"b": True}
        with pytest.raises(SealedError):  # only the end of the session gives the file back
            a.resize(8192)
        entry = store.add("again", a)
        assert entry.tokens == (1,)
        assert list(store) == ["b", "again"]
        with pytest.raises(KeyError):
            store.remove("c")
        store.remove("again", "b")
        assert list(store) == []
        store.discard()
        a.resize(8192)


@pytest.mark.in_guest
def test_several_files_are_added_at_once_and_the_rest_of_them_by_the_same_call_again() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    with LiveUpdate() as device:
        other = device.create_session("other")
    files = [Memfd.create(str(number), 4096) for number in range(5)]
    other.preserve(files[3], 1)
    new = [NewEntry(str(number), file) for number, file in enumerate(files)]
    with pytest.raises(AlreadyPreservedError):
        store.add_many(new)
    assert list(store) == ["0", "1", "2"]
    assert list(guest_store.read_entries(store)) == ["0", "1", "2"]
    other.discard()
    assert [entry.name for entry in store.add_many(new)] == ["0", "1", "2", "3", "4"]
    assert guest_store.read_entries(store) == dict.fromkeys("01234", True)
    with pytest.raises(StoreError):  # a new call, now that the other one is complete
        store.add_many(new)
    store.discard()
    for file in files:
        file.close()


@pytest.mark.in_guest
def test_a_session_whose_first_token_is_taken_is_no_store() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as a:
        session = device.create_session("s")
        session.preserve(a, 0)
        with pytest.raises(TokenInUseError):
            OutgoingStore.from_session(session)
        assert session.has(0)
        session.discard()


@pytest.mark.in_guest
def test_a_store_that_could_not_be_created_leaves_the_name_of_another_alone() -> None:
    store = OutgoingStore.create("s", keeper=ALONE)
    with pytest.raises(SessionExistsError):
        OutgoingStore.create("s", keeper=ALONE)
    with LiveUpdate(), pytest.raises(DeviceBusyError):
        OutgoingStore.create("t", keeper=ALONE, wait=0.05)
    assert store.session.has(0)
    store.discard()


@pytest.mark.in_guest
def test_an_unkept_store_is_not_closed_by_accident() -> None:
    assert KeeperChoice.NONE is ALONE
    store = OutgoingStore.create("s", keeper=ALONE)
    with pytest.raises(StoreError, match="discard"):
        store.close()
    assert store.session.has(0)
    store.discard()
    store.discard()
    with pytest.raises(ValueError, match="closed"):
        store.remove("a")


@pytest.mark.in_guest
def test_several_threads_may_fill_one_store() -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = OutgoingStore.create("s", keeper=ALONE)
    memfds = [Memfd.create(str(number), 4096) for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.add(str(number), memfds[number]), range(32)))
    assert sorted(store, key=int) == [str(number) for number in range(32)]
    assert len({entry.tokens for entry in store.entries}) == 32
    store.discard()
    for memfd in memfds:
        memfd.close()


@pytest.mark.in_guest
def test_an_entry_is_written_down_before_its_file_is_in() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
    watched = guest_store.Watched.from_fd(session.detach(), trusted=True)
    store = guest_store.watch(watched)
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b, Memfd.create("c", 1) as c:
        store.add("a", a)
        store.add("b", b)
        assert watched.seen == [{"a": False}, {"a": True, "b": False}]
        store.set_meta({"x": 1})
        assert guest_store.read_entries(store) == {"a": True, "b": True}
        store.remove("a")
        assert guest_store.read_entries(store) == {"b": True}
        store.add("c", c)
        assert list(store) == ["b", "c"]
    store.discard()
