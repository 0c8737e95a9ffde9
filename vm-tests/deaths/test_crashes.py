"""Provoke deaths of a guest: each is reported as its cause, and never as a test's verdict."""

from __future__ import annotations

import os
import signal
import time
from threading import Timer
from typing import TYPE_CHECKING

import pytest
from harness import guest_actions

from pyluo import ImageRejectedError, kexec
from pyluo.vm import VM, Complaint, Death, GuestCrash, HarnessError, Kernel

if TYPE_CHECKING:
    from pathlib import Path


def test_a_panic_is_told_with_the_kernels_words_and_its_trace(vm: VM) -> None:
    life = vm.life.number
    with pytest.raises(GuestCrash) as caught:
        vm.call(guest_actions.panic_now)
    crash = caught.value
    assert crash.cause is Complaint.PANIC
    assert crash.reason == "sysrq triggered crash"
    assert any("sysrq_handle_crash" in line for line in crash.console)
    assert (crash.kernel, crash.life) == (vm.kernel.name, life)


def test_a_panic_between_two_calls_is_told_by_the_next(vm: VM) -> None:
    vm.call(guest_actions.panic_soon)
    with pytest.raises(GuestCrash) as caught:
        vm.call(time.sleep, 60)
    assert caught.value.cause is Complaint.PANIC
    assert vm.dead


def test_a_dead_guest_stays_dead(vm: VM) -> None:
    jumps = vm.jumps
    with pytest.raises(GuestCrash) as first:
        vm.call(guest_actions.panic_now)
    with pytest.raises(GuestCrash) as second:
        vm.live_update()
    assert str(second.value) == str(first.value)
    assert vm.jumps == jumps


def test_a_panic_after_a_jump_names_the_life_it_happened_in(vm: VM) -> None:
    before = vm.life.number
    vm.live_update()
    with pytest.raises(GuestCrash) as caught:
        vm.call(guest_actions.panic_now)
    assert caught.value.life == before + 1


def test_the_death_of_the_worker_is_a_death_of_the_guest(vm: VM) -> None:
    with pytest.raises(GuestCrash, match="worker ended, wait status 0x300") as caught:
        vm.call(guest_actions.end_worker)
    assert caught.value.cause is Complaint.PANIC


def test_a_qemu_killed_from_outside_is_told_with_the_signal(vm: VM) -> None:
    killer = Timer(0.5, os.kill, (vm.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(GuestCrash) as caught:
        vm.call(time.sleep, 60)
    assert caught.value.cause is Death.QEMU
    assert "SIGKILL" in caught.value.reason


def test_the_monitor_of_a_dead_guest_does_not_make_anyone_wait(vm: VM) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(GuestCrash):
        vm.call(time.sleep, 60)
    with pytest.raises(GuestCrash):
        vm.qmp("query-status")


def test_a_panic_that_ends_qemu_at_once_is_still_a_panic(kernel: Kernel) -> None:
    with VM(kernel, append="panic=-1") as vm, pytest.raises(GuestCrash) as caught:
        vm.call(guest_actions.panic_now)
    assert caught.value.cause is Complaint.PANIC
    assert caught.value.reason == "sysrq triggered crash"


def test_a_guest_that_jumps_unasked_is_no_verdict(vm: VM) -> None:
    before, before_kernel = vm.boot_id, vm.kernel.name
    image = os.fspath(vm.kernel.image)
    cmdline = vm.run(["cat", "/proc/cmdline"]).stdout.decode().strip()
    vm.call(kexec.load, image, cmdline=cmdline)
    with pytest.raises(HarnessError, match="booted again"):
        vm.call(kexec.reboot)
    assert vm.boot_id != before
    assert vm.life.kernel == vm.kernel.name == before_kernel
    assert vm.call(os.getpid) > 1


def test_a_kernel_that_the_guest_chose_itself_is_not_taken_for_the_last(vm: VM) -> None:
    other, before = Kernel.find("previous"), vm.life.number
    cmdline = vm.run(["cat", "/proc/cmdline"]).stdout.decode().strip()
    vm.call(kexec.load, os.fspath(other.image), cmdline=cmdline)
    with pytest.raises(HarnessError, match="booted again"):
        vm.call(kexec.reboot)
    assert vm.life.kernel == vm.kernel.name == vm.kernel.release == other.release
    with pytest.raises(GuestCrash) as caught:
        vm.call(guest_actions.panic_now)
    assert (caught.value.kernel, caught.value.life) == (other.release, before + 1)


def test_a_qemu_that_refuses_its_options_is_a_failure_of_the_harness(kernel: Kernel) -> None:
    broken = VM(kernel, devices=["no-such-device"])
    with pytest.raises(HarnessError, match="no-such-device"), broken:
        pytest.fail("QEMU started with a device that does not exist")


def test_a_command_line_that_the_kernel_would_cut_is_refused(kernel: Kernel) -> None:
    too_long = VM(kernel, append="x" * 2048)
    with pytest.raises(HarnessError, match="2047 bytes"), too_long:
        pytest.fail("a guest was started with half a command line")
    too_long = VM("signed", append="x" * 1400)  # behind the 300 bytes that are built in
    with pytest.raises(HarnessError, match="1746 bytes"), too_long:
        pytest.fail("a guest was started with half a command line")


def test_a_jump_that_the_kernel_refuses_leaves_the_guest_running(vm: VM, tmp_path: Path) -> None:
    broken, before = tmp_path / "bzImage", vm.updates or 0
    broken.write_bytes(vm.kernel.image.read_bytes()[:10_000])
    with pytest.raises(ImageRejectedError, match="kexec_file_load"):
        vm.live_update(broken)
    assert vm.call(os.getpid) > 1
    vm.live_update()
    assert vm.updates == before + 1


def test_a_qemu_that_is_stopped_says_nothing_of_the_kernel(vm: VM) -> None:
    stopper = Timer(0.5, os.kill, (vm.pid, signal.SIGSTOP))
    stopper.start()
    with pytest.raises(GuestCrash) as caught:
        vm.call(time.sleep, 60)
    assert caught.value.cause is Death.QEMU
    assert "it is stopped, by a signal or a debugger" in caught.value.reason
    start = time.monotonic()
    vm.close()
    assert time.monotonic() - start < 8


def test_a_crash_that_cannot_be_examined_is_a_crash(
    vm: VM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("not to be read")

    monkeypatch.setattr("pyluo.vm.machine.postmortem.trace", fail)
    with pytest.raises(GuestCrash) as caught:
        vm.call(guest_actions.panic_now)
    assert (caught.value.cause, caught.value.reason) == (Complaint.PANIC, "sysrq triggered crash")
    assert "not to be read" in caught.value.__notes__[0]


def test_a_network_that_does_not_come_up_is_no_panic(kernel: Kernel) -> None:
    guest = VM(kernel, append="PYLUO_NETWORK=1")  # and no interface
    with pytest.raises(HarnessError, match="CONFIG_VIRTIO_NET"), guest:
        pytest.fail("a guest came up without its network")
