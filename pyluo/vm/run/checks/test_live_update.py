"""Descriptor stores and sessions survive hop after hop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.guest import checks, demo

if TYPE_CHECKING:
    from pyluo.vm import VM


def test_memory_and_its_seals_survive_each_hop(vm: VM, hops: int) -> None:
    """Preserve memfds with holes, odd sizes and seals in a descriptor store; check each hop."""
    vm.hold(checks.preserve_files)
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.call(checks.problems, vm.hold(checks.check_files)) == [], f"hop {hop}"


def test_sessions_by_the_dozen_survive_each_hop(vm: VM, hops: int) -> None:
    """Preserve sessions with a memfd in each; retrieve them by their names after each hop."""
    vm.hold(checks.preserve_sessions)
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.call(checks.problems, vm.hold(checks.check_sessions)) == [], f"hop {hop}"


def test_what_was_not_preserved_is_gone(vm: VM) -> None:
    """Preserve a memfd in a session, and check that other files and memory are gone."""
    held = vm.hold(demo.preserve, 1 << 20)
    preserved = vm.call(demo.digest, held)
    vm.live_update()
    assert vm.call(demo.retrieve, False) == (preserved, [])


def test_each_hop_is_counted_by_the_kernel(vm: VM, hops: int) -> None:
    """Compare the count of live updates that KHO hands over with the number of hops."""
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.updates == hop
