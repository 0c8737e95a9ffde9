"""Tests of what is remembered of KVM, with programs in the place of QEMU."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from pyluo.vm.machine import accelerator, kvm
from pyluo.vm.machine.accelerator import Accelerator, Choice

if TYPE_CHECKING:
    from pathlib import Path

BOOTED = 85  # the status of QEMU when the boot sector has run


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of /dev/kvm; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    monkeypatch.delenv("PYLUO_ACCEL", raising=False)
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(accelerator, "_DEVICE", path)
    return path


def qemu(folder: Path, script: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n{script}\n")
    path.chmod(0o755)
    return os.fspath(path)


def count_runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


def test_kvm_that_runs_a_boot_sector_is_chosen_and_that_is_remembered(tmp_path: Path) -> None:
    binary = qemu(tmp_path, f"exit {BOOTED}")
    for _ in range(2):
        assert Choice.make(binary) == (Accelerator.KVM, "it runs a boot sector", False)
    assert count_runs(tmp_path) == 1
    assert not kvm.probe(binary).proven
    kvm.prove(binary)
    assert kvm.probe(binary).proven
    assert Choice.make(binary).accelerator is Accelerator.KVM


def test_kvm_that_runs_no_kernel_is_not_chosen_again(tmp_path: Path) -> None:
    binary = qemu(tmp_path, f"exit {BOOTED}")
    Choice.make(binary)
    kvm.distrust(binary)
    choice = Choice.make(binary)
    assert (choice.accelerator, count_runs(tmp_path)) == (Accelerator.TCG, 1)
    assert "a kernel hangs" in choice.reason


def test_a_qemu_that_refuses_kvm_says_so_until_it_changes(tmp_path: Path) -> None:
    binary = qemu(tmp_path, "exit 1")
    for _ in range(2):
        choice = Choice.make(binary)
        assert choice == (Accelerator.TCG, "with KVM, QEMU ended with status 1", False)
    assert count_runs(tmp_path) == 1
    os.utime(binary, (1, 1))
    Choice.make(binary)
    assert count_runs(tmp_path) == 2


def test_one_slow_start_is_not_remembered_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "_PROBE_TIMEOUT", 0.2)
    binary = qemu(tmp_path, f"test -e {tmp_path}/fast || sleep 9; exit {BOOTED}")
    assert Choice.make(binary).accelerator is Accelerator.TCG
    (tmp_path / "fast").touch()
    assert Choice.make(binary).accelerator is Accelerator.TCG
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    assert Choice.make(binary).accelerator is Accelerator.KVM


def test_what_is_asked_for_is_not_tried_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = qemu(tmp_path, "exit 1")
    assert Choice.make(binary, Accelerator.KVM) == (Accelerator.KVM, "asked for", True)
    monkeypatch.setenv("PYLUO_ACCEL", "kvm")
    assert Choice.make(binary) == (Accelerator.KVM, "PYLUO_ACCEL", True)
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_kvm_says_so(tmp_path: Path, device: Path) -> None:
    device.unlink()
    assert Choice.make("qemu") == (Accelerator.TCG, f"there is no {device}", False)
