"""Tests of the RAM of a guest in several memfds: over a jump, and with settings of a kernel."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from pyluo import GuestRam
from pyluo.errors import RequestError
from sessions import guest_ram
from sessions.guest_ram import HUGE, PART, SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm import VM

HUGE_PAGES = "/proc/sys/vm/nr_hugepages"
OVERCOMMIT = "/proc/sys/vm/overcommit_memory"


@pytest.mark.parametrize("preserve", [guest_ram.preserve, guest_ram.preserve_huge])
def test_a_ram_of_several_memfds_survives_as_one(vm: VM, preserve: Callable[..., object]) -> None:
    description = vm.call(guest_ram.describe, vm.hold(preserve, "vm0"))
    vm.live_update()
    assert vm.call(guest_ram.inspect, "vm0", description) == (True, True, description)


def test_a_kernel_without_numa_refuses_policies_but_not_the_memory(vm: VM) -> None:
    description = vm.call(guest_ram.describe, vm.hold(guest_ram.preserve, "vm0"))
    vm.live_update()
    refusal = vm.call(guest_ram.refuse_policies_without_numa, "vm0", description)
    assert "The kernel needs CONFIG_NUMA" in refusal


@pytest.mark.in_guest
def test_huge_pages_are_mapped_in_one_piece_and_each_is_aligned() -> None:
    pages = SIZE // HUGE
    with guest_ram.setting(HUGE_PAGES, str(pages)):
        assert guest_ram.free_huge_pages() == pages
        with GuestRam.create("ram", SIZE, part_size=PART, huge_page_size=HUGE) as ram:
            with ram.map() as mapping:
                assert mapping.address % HUGE == 0
                assert guest_ram.free_huge_pages() == 0  # all are reserved, and none twice
                mapping[PART - 1 : PART + 1] = b"ab"
            assert ram.memfds[0].read(2, PART - 1) == b"a"
            assert ram.memfds[1].read(2, 0) == b"b\0"
            again = GuestRam.from_memfds(ram.memfds, ram.as_json())
            with again.map(populate=True) as mapping:
                assert mapping.address % HUGE == 0
                assert mapping[PART - 1 : PART + 1] == b"ab"


@pytest.mark.in_guest
def test_more_huge_pages_than_are_reserved_are_not_allocated() -> None:
    before = guest_ram.count_descriptors()
    with guest_ram.setting(HUGE_PAGES, str(SIZE // HUGE - 1)):
        with pytest.raises(RequestError, match="reserve some first") as caught:
            GuestRam.create("ram", SIZE, part_size=PART, huge_page_size=HUGE, populate=True)
        assert caught.value.errno == errno.ENOMEM
        assert guest_ram.count_descriptors() == before
        assert guest_ram.free_huge_pages() == SIZE // HUGE - 1


@pytest.mark.in_guest
def test_mapping_commits_no_memory() -> None:
    with (
        guest_ram.setting(OVERCOMMIT, "2"),
        GuestRam.create("ram", 3 << 40) as ram,
        ram.map() as mapping,
    ):
        mapping[-1] = 1
        assert ram.read(1, (3 << 40) - 1) == b"\x01"
