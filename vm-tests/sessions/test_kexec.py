"""Tests of loading and unloading the next kernel, and of what it knows of the old one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyluo import ImageRejectedError, KexecError, kexec, kho
from pyluo.vm import VM, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.kho import KhoStatus

GARBAGE = Path("/run/garbage")


def test_an_image_is_loaded_and_dropped(shared_vm: VM) -> None:
    assert not shared_vm.call(kexec.loaded)
    shared_vm.call(kexec.load, os.fspath(shared_vm.kernel.image), reuse_cmdline=True)
    assert shared_vm.call(kexec.loaded)
    shared_vm.call(kexec.unload)
    assert not shared_vm.call(kexec.loaded)


def test_unloading_nothing_is_no_error(shared_vm: VM) -> None:
    shared_vm.call(kexec.unload)


def test_a_file_that_is_no_kernel_is_rejected(shared_vm: VM) -> None:
    shared_vm.call(write_garbage)
    with pytest.raises(ImageRejectedError) as caught:
        shared_vm.call(kexec.load, os.fspath(GARBAGE), reuse_cmdline=True)
    assert caught.value.errno == errno.ENOEXEC
    assert os.fspath(GARBAGE) in str(caught.value)


def test_an_image_that_is_not_there_is_named(shared_vm: VM) -> None:
    with pytest.raises(KexecError, match="/no/such/image") as caught:
        shared_vm.call(kexec.load, "/no/such/image", reuse_cmdline=True)
    assert caught.value.errno == errno.ENOENT


def test_a_jump_without_an_image_touches_nothing(shared_vm: VM) -> None:
    with pytest.raises(KexecError):
        shared_vm.call(kexec.reboot)


def test_a_cold_boot_was_handed_nothing(shared_vm: VM) -> None:
    status = shared_vm.call(kho.status)
    assert status.live_update
    assert (status.handed_over, status.from_release) == (False, None)
    assert (status.kexecs, status.updates, status.obstacles) == (0, 0, ())


def test_the_new_kernel_knows_where_it_came_from_and_after_how_many_updates() -> None:
    previous, stable = Kernel.find("previous"), Kernel.find("stable")
    with VM(previous) as vm:
        vm.live_update(stable)
        first: KhoStatus = vm.call(kho.status)
        vm.live_update(stable)
        second: KhoStatus = vm.call(kho.status)
    assert (first.release, first.from_release) == (stable.release, previous.release)
    assert second.from_release == stable.release
    assert (first.handed_over, first.kexecs, first.updates) == (True, 1, 1)
    assert (second.handed_over, second.kexecs, second.updates) == (True, 2, 2)


@pytest.mark.parametrize("off", ["liveupdate=off", "kho=off"])
def test_a_kernel_with_live_update_off_says_what_to_change(
    guest: Callable[..., VM], kernel: Kernel, off: str
) -> None:
    vm = guest(kernel, append=off)
    status = vm.call(kho.status)
    assert not status.live_update
    assert any(off in obstacle.missing or off in obstacle.remedy for obstacle in status.obstacles)


def write_garbage() -> None:
    GARBAGE.write_bytes(b"no kernel" * 4096)
