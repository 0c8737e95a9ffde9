"""Tests of recording, refusing, rebuilding and undoing layouts of IOASes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from pyluo import IoasLayoutError, StoreError
from pyluo.vm import VM
from vfio import guest_layout
from vfio.guest_dma import SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.vm import Kernel


@pytest.fixture(scope="module")
def machine(kernel: Kernel) -> Iterator[VM]:
    """A guest with three devices; each test leaves it unchanged."""
    with VM(kernel, **guest_layout.GUEST) as vm:  # type: ignore[arg-type]
        yield vm


def test_devices_of_one_group_share_the_rebuilt_page_table(machine: VM) -> None:
    machine.call(guest_layout.rebuild_for_a_fresh_group)


def test_a_group_that_is_attached_is_moved_to_the_rebuilt_page_table(machine: VM) -> None:
    machine.call(guest_layout.rebuild_for_a_group_that_is_attached)


def test_a_group_moves_as_a_whole_and_each_device_knows(machine: VM) -> None:
    machine.call(guest_layout.move_a_group)


def test_a_device_that_was_moved_is_put_back_if_the_next_one_fails(machine: VM) -> None:
    assert machine.call(guest_layout.rebuild_fails_after_a_device_was_moved) == []


def test_a_device_of_another_iommufd_is_refused_before_anything_is_done(machine: VM) -> None:
    with pytest.raises(ValueError, match="lives in another iommufd"):
        machine.call(guest_layout.rebuild_in_the_iommufd_of_another_device)


def test_all_that_is_wrong_with_a_layout_is_told_at_once(machine: VM) -> None:
    number, text = machine.call(guest_layout.rebuild_with_several_faults)
    assert number == errno.ENOENT
    for part in ("'nvram', which is missing", "which has 4096", "is outside 0x0.."):
        assert part in text


def test_what_is_allowed_is_rebuilt_too(machine: VM) -> None:
    chosen, allowed = machine.call(guest_layout.rebuild_allowed_ranges)
    assert chosen in allowed
    assert chosen.length == SIZE


@pytest.mark.parametrize(
    ("record", "number", "why"),
    [
        (guest_layout.record_what_is_mapped_by_address, errno.EINVAL, "mapped by its address"),
        (guest_layout.record_what_has_no_name, errno.ENOENT, "is none of ['ram']"),
    ],
)
def test_what_cannot_be_repeated_is_not_recorded(
    machine: VM, record: Callable[[], None], number: int, why: str
) -> None:
    with pytest.raises(IoasLayoutError) as caught:
        machine.call(record)
    assert caught.value.errno == number
    assert why in str(caught.value)


def test_a_store_has_a_layout_under_each_key_and_names_the_keys_if_there_is_none(
    machine: VM,
) -> None:
    with pytest.raises(IoasLayoutError, match="'ioas', 'machine', 'second'") as caught:
        machine.call(guest_layout.save_layouts_under_two_keys)
    assert caught.value.errno == errno.ENOENT


def test_a_layout_is_adopted_only_if_its_files_are_there_and_all_of_it_is_mapped(
    machine: VM,
) -> None:
    missing, stale = machine.call(guest_layout.adopt_what_is_not_mapped)
    assert "'ram', which is missing" in missing
    assert "is not mapped" in stale


def test_rebuilding_from_a_store_is_not_having_got_the_memory_back(kernel: Kernel) -> None:
    with VM(kernel, **guest_layout.GUEST) as vm:  # type: ignore[arg-type]
        vm.hold(guest_layout.preserve)
        vm.live_update()
        with pytest.raises(StoreError, match="'ram'") as caught:
            vm.call(guest_layout.finish_after_rebuilding)
        assert caught.value.errno == errno.EBUSY
