"""Tests of descriptor stores: before a jump, over one, and over many."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from sessions import guest_files

from pyluo import (
    AlreadyPreservedError,
    DeviceBusyError,
    FdStore,
    FdStoreError,
    LiveUpdate,
    LuoError,
    Memfd,
    NotPreservableError,
    TokenInUseError,
)
from pyluo.vm import VM
from stores import guest_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

HOPS = int(os.environ.get("PYLUO_STORE_HOPS", "20"))
NAMES = [f"s{number}" for number in range(7)]
SPOILED = {"nonsense": "nonsense", "newer": "newer"}


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
    # get() returned the device, and retrieved the RAM before it, but did not return the RAM.
    assert "entries ['ram', 'log'], which get() did not return" in result["refusal"]
    assert result["whole"]
    assert result["closed"]


@pytest.fixture(scope="module")
def landed(kernel: Kernel) -> Iterator[VM]:
    with VM(kernel) as vm:
        vm.hold(guest_store.make_many, NAMES)
        vm.hold(guest_store.make_spoiled, SPOILED)
        vm.hold(guest_store.preserve_half, "half")
        vm.hold(session_without_a_table)
        vm.hold(guest_store.make_version_1, "version 1")
        vm.hold(guest_store.make_needing, "needs")
        vm.live_update()
        yield vm


def session_without_a_table() -> object:
    with LiveUpdate() as device, Memfd.create("b", 8192) as memfd:
        session = device.create_session("plain")
        memfd.write(guest_files.pattern(8192, 1), 0)
        session.preserve(memfd, 2)
    return session


def test_a_finish_destroys_only_what_it_names(landed: VM) -> None:
    assert landed.call(guest_store.finish_without_one, "s0") == (True, True)


def test_a_renewal_can_leave_an_entry_behind(landed: VM) -> None:
    assert landed.call(guest_store.renew_without_one, "s1") == ["b"]


def test_an_exception_costs_a_retrieved_store_nothing_even_renewed(landed: VM) -> None:
    assert landed.call(guest_store.leave_renewed_by_an_exception, "s2")


def test_leaving_a_block_does_not_destroy_what_was_not_retrieved(landed: VM) -> None:
    assert landed.call(guest_store.leave_without_retrieving, "s3") == (True, True)


def test_a_renewal_without_the_device_touches_nothing(landed: VM) -> None:
    assert landed.call(guest_store.renew_while_the_device_is_busy, "s4") == (
        "DeviceBusyError",
        True,
    )


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("nonsense", errno.EBADMSG, "neither of its two slots is valid"),
        ("newer", errno.EPROTONOSUPPORT, "version 3, where this pyluo reads up to 2"),
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


@pytest.mark.in_guest
def test_a_store_refuses_what_would_not_come_back() -> None:
    store = FdStore.create("s")
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096, executable=False) as noexec:
        store.add("a", a)
        with pytest.raises(FdStoreError) as caught:
            store.add("a", noexec)
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(FdStoreError) as caught:
            store.add("b", noexec, requires=["c"])
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(NotPreservableError):
            store.add("b", noexec)
        with pytest.raises(AlreadyPreservedError):
            store.add("b", a)
        with pytest.raises(LuoError) as bad:
            store.add("b", 1000)
        assert bad.value.errno == errno.EBADF
        with pytest.raises(TypeError):
            store.add("b", noexec, meta={"x": object()}, allow_noexec=True)
        assert list(store) == ["a"]
        store.add("b", noexec, requires=["a"], allow_noexec=True)
        with pytest.raises(FdStoreError) as caught:
            store.remove("a")
        assert caught.value.errno == errno.EBUSY
    store.discard()


@pytest.mark.in_guest
def test_a_failed_add_leaves_no_descriptor_and_no_entry() -> None:
    store = FdStore.create("s")
    before = len(os.listdir("/proc/self/fd"))
    event = os.eventfd(0)
    with pytest.raises(NotPreservableError):
        store.add("event", event)
    os.close(event)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "event" not in store
    store.discard()


@pytest.mark.in_guest
def test_a_full_table_refuses_the_next_entry_and_keeps_the_others() -> None:
    store = FdStore.create("s", table_size=400)
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b:
        store.add("a", a)
        with pytest.raises(FdStoreError) as caught:
            store.add("b", b, meta={"text": "x" * 400})
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(FdStoreError):
            store.set_meta({"text": "x" * 400})
        assert list(store) == ["a"]
        assert store.meta == {}
        store.add("b", b)
    store.discard()


@pytest.mark.in_guest
def test_removing_an_entry_gives_its_file_back_and_keeps_the_rest() -> None:
    store = FdStore.create("s")
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b:
        store.add("a", a)
        store.add("b", b)
        with LiveUpdate(), pytest.raises(DeviceBusyError):
            store.remove("a")
        assert list(store) == ["a", "b"]
        store.remove("a")
        a.resize(8192)
        with pytest.raises(LuoError):
            b.resize(8192)
        store.add("a", a)
        assert list(store) == ["b", "a"]
    with pytest.raises(KeyError):
        store.remove("c")
    store.discard()


@pytest.mark.in_guest
def test_an_outgoing_store_gives_out_descriptors_and_neither_finishes_nor_is_finished() -> None:
    store = FdStore.create("s")
    with Memfd.create("a", 4096) as a:
        store.add("a", a)
    with store.get("a", Memfd) as again:
        assert again.size == 4096
    with pytest.raises(FdStoreError) as caught:
        store.finish()
    assert caught.value.errno == errno.EPERM
    store.renew()
    assert "entries=1" in repr(store)
    store.discard()


@pytest.mark.in_guest
def test_a_session_whose_first_token_is_taken_is_no_store() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as a:
        session = device.create_session("s")
        session.preserve(a, 0)
        with pytest.raises(TokenInUseError):
            FdStore(session)
        session.discard()


@pytest.mark.in_guest
def test_an_exception_discards_a_store_that_was_created() -> None:
    with pytest.raises(ZeroDivisionError), FdStore.create("s"):
        raise ZeroDivisionError
    FdStore.create("s").discard()


@pytest.mark.in_guest
def test_several_threads_may_fill_one_store() -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = FdStore.create("s")
    memfds = [Memfd.create(str(number), 4096) for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.add(str(number), memfds[number]), range(32)))
    assert sorted(store, key=int) == [str(number) for number in range(32)]
    assert len({entry.token for entry in store.entries}) == 32
    store.discard()
    for memfd in memfds:
        memfd.close()


@pytest.mark.in_guest
def test_an_entry_is_written_down_before_its_file_is_in_and_again_after_it() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
    watched = guest_store.Watched.from_fd(session.detach(), trusted=True)
    store = guest_store.watch(watched)
    with Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b, Memfd.create("c", 1) as c:
        store.add("a", a)
        store.add("b", b)
        assert watched.seen == [{"a": False}, {"a": True, "b": False}]
        assert guest_store.read_entries(store) == {"a": True, "b": True}
        before = guest_store.slot_in_use(store)
        store.set_meta({"x": 1})
        assert guest_store.slot_in_use(store) == 1 - before  # the previous table stays readable
        store.remove("a")
        assert guest_store.read_entries(store) == {"b": True}
        store.add("c", c)
        assert list(store) == ["b", "c"]
    store.discard()


@pytest.mark.in_guest
def test_a_failure_half_way_through_a_removal_is_taken_up_by_a_renewal() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
    store = FdStore(session)
    files = {name: Memfd.create(name, 4096) for name in ("a", "b", "c", "d")}
    for name, file in files.items():
        store.add(name, file)
    with LiveUpdate() as device:
        other = device.create_session("other")
        guest_store.run_after_discard(store, lambda: other.preserve(files["c"], 1))
        with pytest.raises(AlreadyPreservedError):
            store.remove("a", device=device)
        assert [entry.preserved for entry in store.entries] == [True, False, False]
        with pytest.raises(FdStoreError, match="renew"):
            store.detach()
        other.discard()
    store.renew()
    assert [entry.preserved for entry in store.entries] == [True, True, True]
    assert guest_store.read_entries(store) == {"b": True, "c": True, "d": True}
    store.discard()
    for file in files.values():
        file.close()


@pytest.mark.in_guest
def test_a_session_that_somebody_else_holds_too_is_not_taken_apart() -> None:
    store = FdStore.create("s")
    with Memfd.create("a", 4096) as a:
        store.add("a", a)
    other = os.dup(store.session.fileno())
    with pytest.raises(FdStoreError, match="also held by process") as caught:
        store.remove("a")
    os.close(other)
    assert caught.value.errno == errno.EBUSY
    store.remove("a")
    store.discard()


def test_an_older_table_is_read_and_renewed_in_its_order(landed: VM) -> None:
    """The tokens of this table of version 1 are not in the order of its entries."""
    names, meta, tokens, is_intact = landed.call(guest_store.read_version_1, "version 1")
    assert names == ["ram", "device"]
    assert meta == {"at": 1}
    assert tokens == [9, 3]
    assert is_intact


def test_what_an_entry_requires_is_retrieved_before_it(landed: VM) -> None:
    assert landed.call(guest_store.retrieve_with_prerequisites, "needs") == [2, 1, 3]


def test_a_renewal_refuses_what_has_grown_before_it_gives_anything_up(landed: VM) -> None:
    assert landed.call(guest_store.renew_what_has_grown, "s6") == (True, True, True)


def test_a_renewal_that_cannot_preserve_keeps_the_files_even_if_it_is_dropped(landed: VM) -> None:
    assert landed.call(guest_store.renew_and_drop_half_way, "s5") == (True, True)
