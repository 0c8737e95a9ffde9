"""Descriptor stores and sessions, hop after hop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.guest import checks, survival

if TYPE_CHECKING:
    from pyluo.vm import VM


def test_memory_and_its_seals_survive_each_hop(vm: VM, hops: int) -> None:
    """Files with holes, of odd sizes and with seals, by a descriptor store."""
    vm.hold(checks.build)
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.call(checks.complaints, vm.hold(checks.carry_on)) == [], f"hop {hop}"


def test_sessions_by_the_dozen_survive_each_hop(vm: VM, hops: int) -> None:
    """Each by its name, with its own file."""
    vm.hold(checks.build_sessions)
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.call(checks.complaints, vm.hold(checks.carry_sessions_on)) == [], f"hop {hop}"


def test_what_was_not_preserved_is_gone(vm: VM) -> None:
    """Files and memory beside a session do not come along with it."""
    held = vm.hold(survival.preserve, 1 << 20)
    preserved = vm.call(survival.digest, held)
    vm.live_update()
    assert vm.call(survival.retrieve, False) == (preserved, [])


def test_each_hop_is_counted_by_the_kernel(vm: VM, hops: int) -> None:
    """Kexec HandOver tells each kernel how many came before it."""
    for hop in range(1, hops + 1):
        vm.live_update()
        assert vm.updates == hop
