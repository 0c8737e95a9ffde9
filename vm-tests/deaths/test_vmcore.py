"""Tests of writing a guest's memory to a file on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import guest_actions

from deaths import guest_deaths
from pyluo.vm import VM, Complaint, Death, GuestCrash, HarnessError
from pyluo.vm.machine.vmcore import open_vmcore

if TYPE_CHECKING:
    from pathlib import Path

    from pyluo.vm import Kernel

MEMORY = 512 << 20
SECRET = "what the guest had in memory"


def contains(core: Path, words: str) -> bool:
    return words.encode() in core.read_bytes()


def test_the_memory_of_a_guest_that_died_is_kept_and_named(kernel: Kernel, tmp_path: Path) -> None:
    with VM(kernel, memory=MEMORY, vmcores=tmp_path) as vm:
        vm.hold(guest_actions.echo, SECRET)
        with pytest.raises(GuestCrash) as caught:
            vm.call(guest_actions.panic_now)
    core = caught.value.vmcore
    assert core is not None
    assert list(tmp_path.iterdir()) == [core]
    assert str(core) in str(caught.value)
    assert core.read_bytes()[:4] == b"\x7fELF"
    assert contains(core, SECRET)


def test_the_variable_asks_for_it_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLUO_VMCORES", str(tmp_path))
    with VM("selftest", memory=MEMORY, silence=4) as vm, pytest.raises(GuestCrash) as caught:
        vm.call(guest_deaths.provoke, "HARDLOCKUP")
    assert caught.value.cause is Death.SILENT_HANG
    assert caught.value.vmcore is not None
    assert any("lkdtm_HARDLOCKUP+" in line for line in caught.value.trace)


def test_a_guest_lives_on_after_its_memory_was_written(vm: VM, tmp_path: Path) -> None:
    vm.hold(guest_actions.echo, SECRET)
    vm.dump(tmp_path / "core")
    assert contains(tmp_path / "core", SECRET)
    assert vm.call(guest_actions.echo, 1) == 1


def test_a_folder_that_is_not_there_does_not_hide_the_death(kernel: Kernel, tmp_path: Path) -> None:
    nowhere = tmp_path / "missing"
    with VM(kernel, memory=MEMORY, vmcores=nowhere) as vm, pytest.raises(GuestCrash) as caught:
        vm.call(guest_actions.panic_now)
    assert caught.value.cause is Complaint.PANIC
    assert caught.value.vmcore is None
    assert any("was not written" in note for note in caught.value.__notes__)


def test_a_core_of_a_kernel_that_did_not_say_where_things_are_is_refused(
    kernel: Kernel, tmp_path: Path
) -> None:
    with VM(kernel, memory=MEMORY) as vm:
        vm.dump(tmp_path / "core")
    with pytest.raises(HarnessError, match="CONFIG_FW_CFG_SYSFS"):
        open_vmcore(tmp_path / "core", kernel)
