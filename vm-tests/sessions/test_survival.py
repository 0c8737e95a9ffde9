"""Tests of what a live update carries over, and of what it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo import Seal, SessionNotFoundError
from pyluo.vm import Kernel
from sessions import guest_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm import VM

SIZE = (1 << 20) + 4099  # neither a multiple of a page nor of the pattern


def test_contents_size_seals_and_position_of_a_memfd_survive(vm: VM) -> None:
    seals = Seal.SHRINK | Seal.GROW
    vm.hold(guest_files.preserve, "vm0", SIZE, seals=seals, position=12345)
    vm.live_update()
    assert vm.call(guest_files.inspect, "vm0") == (True, SIZE, seals, 12345)


def test_what_was_not_preserved_is_gone(vm: VM) -> None:
    vm.hold(guest_files.preserve, "vm0", 4096, token=1)
    paths = vm.call(guest_files.create_files)
    assert vm.call(guest_files.filter_existing, paths) == paths
    vm.live_update()
    assert vm.call(guest_files.filter_existing, paths) == []
    assert not vm.call(guest_files.token_is_known, "vm0", 2)


def test_a_session_whose_descriptor_was_released_is_not_carried_over(vm: VM) -> None:
    vm.call(discard_before_the_jump)
    vm.live_update()
    with pytest.raises(SessionNotFoundError):
        vm.call(guest_files.inspect, "vm0")


def test_memory_survives_two_hops_in_a_row(vm: VM) -> None:
    before = vm.updates or 0
    vm.hold(guest_files.preserve, "vm0", SIZE)
    vm.live_update()
    vm.hold(guest_files.preserve_again, "vm0")
    vm.live_update()
    assert vm.call(guest_files.inspect, "vm0")[:2] == (True, SIZE)
    assert vm.updates == before + 2


def test_an_incoming_session_is_not_carried_over_a_second_time(vm: VM) -> None:
    vm.hold(guest_files.preserve, "vm0", SIZE)
    vm.live_update()
    vm.live_update()
    with pytest.raises(SessionNotFoundError):
        vm.call(guest_files.inspect, "vm0")


@pytest.mark.parametrize(("before", "after"), [("stable", "stable"), ("previous", "stable")])
def test_memory_survives_from_one_kernel_to_another(
    guest: Callable[..., VM], before: str, after: str
) -> None:
    vm = guest(before)
    assert vm.life.release == Kernel.find(before).release
    assert (before == after) == (Kernel.find(before).release == Kernel.find(after).release)
    vm.hold(guest_files.preserve, "vm0", SIZE)
    vm.live_update(after)
    assert vm.life.release == Kernel.find(after).release
    assert vm.call(guest_files.inspect, "vm0")[:2] == (True, SIZE)


def test_a_memfd_sealed_against_writing_comes_back_so(vm: VM) -> None:
    vm.hold(guest_files.preserve, "vm0", SIZE, seals=Seal.WRITE)
    vm.live_update()
    assert vm.call(guest_files.inspect, "vm0") == (True, SIZE, Seal.WRITE, 0)


def test_pages_that_were_swapped_out_come_along(guest: Callable[..., VM]) -> None:
    vm = guest("selftest")  # it has a RAM disk to swap to
    assert vm.run(["mkswap", "/dev/ram0"]).returncode == 0
    assert vm.run(["swapon", "/dev/ram0"]).returncode == 0
    held = vm.hold(guest_files.preserve_swapped, "vm0", 2 << 20)
    assert vm.call(guest_files.get_swapped_size, held) > 1 << 20
    vm.live_update()
    assert vm.call(guest_files.inspect, "vm0")[:2] == (True, 2 << 20)


def discard_before_the_jump() -> None:
    session, ram = guest_files.preserve("vm0", 4096)
    session.discard()
    ram.close()
