"""Inject faults: check what dies of each, what survives, and that no test hangs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sessions import guest_files

from harness import guest_faults
from pyluo import ImageRejectedError, LiveUpdateUnavailableError, SessionNotFoundError, kho
from pyluo.guest.faults import (
    FaultMissingError,
    SessionStorm,
    StepNotReachedError,
    check_session_storm,
    lock_up_cpu,
)
from pyluo.vm import VM, Complaint, Death, GuestCrash, Kernel
from pyluo.vm.machine import faults
from pyluo.vm.machine.faults import Next

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 1 << 20
LEFT_MEMORY = 48 << 20  # bytes: enough for the next kernel's image, and little more


def is_intact(vm: VM, name: str = "vm0", token: int = 1) -> bool:
    return vm.call(guest_files.inspect, name, token=token)[0]


def test_a_holder_killed_at_a_step_takes_with_it_what_it_did_not_share(vm: VM) -> None:
    vm.hold(guest_faults.kill_two_holders)
    vm.live_update()
    assert is_intact(vm, "shared")
    with pytest.raises(SessionNotFoundError):
        is_intact(vm, "alone")


def test_a_step_that_is_not_reached_is_told_with_how_far_it_came(shared_vm: VM) -> None:
    with pytest.raises(StepNotReachedError, match="ended after create, preserve"):
        shared_vm.call(guest_faults.stop_at_step_not_reached, "finish")
    with pytest.raises(StepNotReachedError, match=r"after stand: ValueError.*the ground gave way"):
        shared_vm.call(guest_faults.stop_after_exception)
    with pytest.raises(StepNotReachedError, match="without a report"):
        shared_vm.call(guest_faults.stop_after_kill)


def test_an_image_that_ends_after_its_header_is_refused_and_costs_nothing(vm: VM) -> None:
    vm.hold(guest_files.preserve, "vm0", SIZE)
    with pytest.raises(ImageRejectedError, match="headless-bzImage"):
        faults.live_update(vm, Next.HEADLESS)
    vm.live_update()
    assert is_intact(vm)


def test_an_image_that_ends_half_way_is_taken_and_resets_the_machine(vm: VM) -> None:
    next_life = vm.life.number + 1
    with pytest.raises(GuestCrash) as caught:
        faults.live_update(vm, Next.TRUNCATED)
    assert (caught.value.cause, caught.value.life) == (Death.LANDING, next_life)
    assert "reset its machine" in caught.value.reason
    assert any("Starting new kernel" in line for line in caught.value.console)


def test_a_corrupt_image_is_taken_and_halts_before_it_is_a_kernel(kernel: Kernel) -> None:
    with VM(kernel, boot_timeout=30) as vm:
        with pytest.raises(GuestCrash) as caught:
            faults.live_update(vm, Next.CORRUPT)
        assert (caught.value.cause, caught.value.life) == (Death.LANDING, 2)
        assert caught.value.kernel.endswith("corrupt-bzImage")
        assert any("System halted" in line for line in caught.value.console)


def test_a_panic_in_early_boot_is_told_as_the_next_kernels(vm: VM) -> None:
    next_life = vm.life.number + 1
    with pytest.raises(GuestCrash) as caught:
        faults.live_update(vm, Next.EARLY_PANIC)
    assert caught.value.cause in {Complaint.PANIC, Complaint.OOPS}
    assert caught.value.life == next_life
    assert not any("Run " in line and "as init process" in line for line in caught.value.console)


@pytest.mark.parametrize("fault", [Next.NO_KHO, Next.NO_LUO])
def test_a_kernel_that_takes_nothing_over_comes_up_and_says_so(vm: VM, fault: Next) -> None:
    vm.hold(guest_files.preserve, "vm0", SIZE)
    faults.live_update(vm, fault)
    status = vm.call(kho.status)
    assert not status.live_update
    assert any(faults.words(fault) in each.missing + each.remedy for each in status.obstacles)
    with pytest.raises(LiveUpdateUnavailableError):
        is_intact(vm)


def test_memory_is_taken_as_asked_and_given_back(shared_vm: VM) -> None:
    before, during, after = shared_vm.call(guest_faults.take_and_release_memory, 128 << 20)
    assert during <= 128 << 20 < min(before, after)


def test_what_was_preserved_goes_over_when_memory_got_short_and_no_more_is_taken(
    cold_vm: VM,
) -> None:
    held = cold_vm.hold(guest_faults.preserve_under_pressure, LEFT_MEMORY)
    alive, refusal = cold_vm.call(guest_faults.get_shortage_state, held)
    assert alive
    assert "available" in refusal
    cold_vm.live_update()
    assert is_intact(cold_vm)


def test_an_allocation_that_fails_refuses_one_request_and_costs_nothing(
    guest: Callable[..., VM],
) -> None:
    vm = guest("selftest")
    held = vm.hold(guest_faults.preserve_while_each_allocation_fails)
    assert vm.call(guest_faults.get_refusal_count, held) > 1
    vm.live_update()
    assert vm.call(guest_faults.are_both_files_intact)


def test_slabs_that_fail_refuse_one_request_and_cost_nothing(guest: Callable[..., VM]) -> None:
    vm = guest("selftest")
    held = vm.hold(guest_faults.preserve_while_all_allocations_fail)
    refused, *rest = vm.call(guest_faults.get_outcomes, held)
    assert refused != "preserved"
    assert rest == ["preserved"]
    vm.live_update()
    assert is_intact(vm)


def test_a_fault_that_the_kernel_cannot_throw_is_told_with_what_it_lacks(shared_vm: VM) -> None:
    for inject, option in (
        (guest_faults.inject_one_failed_allocation, "CONFIG_FAILSLAB"),
        (guest_faults.inject_failed_slabs, "CONFIG_FAILSLAB"),
        (lock_up_cpu, "CONFIG_LKDTM"),
    ):
        with pytest.raises(FaultMissingError, match=f"lacks {option}, which the kernel selftest"):
            shared_vm.call(inject)


def test_with_one_processor_locked_up_the_others_go_on_but_no_jump_comes_about() -> None:
    """The kernel waits forever for the locked-up CPU before it jumps."""
    append = f"{faults.SPARE_PROCESSOR} rcupdate.rcu_cpu_stall_timeout=3"
    with VM("selftest", cpus=2, append=append, boot_timeout=30) as vm:
        vm.hold(guest_files.preserve, "vm0", SIZE)
        assert vm.call(lock_up_cpu) == 1
        assert vm.call(len, "still there") == 11
        with pytest.raises(GuestCrash) as caught:
            vm.live_update()
        assert caught.value.cause is Complaint.RCU_STALL
        assert "detected stalls" in caught.value.reason
        assert "lkdtm_HARDLOCKUP" in vm.console


def test_the_only_processor_locked_up_is_told_as_a_silent_hang() -> None:
    """The call's timeout passes before the silence counts as a hang."""
    with VM("selftest", call_timeout=5) as vm:
        assert vm.silence > 5
        with pytest.raises(GuestCrash) as caught:
            vm.call(lock_up_cpu)
        assert caught.value.cause is Death.SILENT_HANG


def test_a_processor_that_is_not_set_apart_is_not_locked_up() -> None:
    with (
        VM("selftest", cpus=2) as vm,
        pytest.raises(RuntimeError, match="isolcpus=1 irqaffinity=0"),
    ):
        vm.call(lock_up_cpu)


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_jump_while_ten_threads_create_sessions_loses_none_that_was_whole(
    guest: Callable[..., VM], kernel: Kernel, cpus: int
) -> None:
    vm = guest(kernel, cpus=cpus)
    vm.hold(guest_files.preserve, "vm0", SIZE)
    vm.hold(SessionStorm, threads=10)
    vm.live_update()
    assert is_intact(vm)
    result = vm.call(check_session_storm)
    assert (result.failed, result.lost) == (0, ())
    assert result.intact == result.promised >= 10
