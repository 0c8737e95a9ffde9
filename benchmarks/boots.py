"""Whole live updates of 16 MiB, through the harness and its worker, and by a first process in C."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair
from pyluo import LiveUpdate, Memfd
from pyluo.guest.port import mark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.ratios import Pairs
    from pyluo import OutgoingSession
    from pyluo.vm.machine.qemu import Machine

__all__ = ["blackout_ratio", "cycle_ratio", "lean_blackout_ratio"]

SIZE = 16 << 20  # bytes
REBOOT_CALLED, FIRST_BYTE = "reboot called", "first byte read"
LEAN = Path(__file__).with_name("floors") / "lean.config"


class Times(NamedTuple):
    """The times of one guest in seconds.

    Attributes:
        cycle: from the start of QEMU to its end.
        blackout: from the call of reboot() to the first byte that was read of the retrieved file.
    """

    cycle: float
    blackout: float


def cycle_ratio(kernel: str, rounds: int) -> Pairs:
    """Boot, preserve, live-update, retrieve, verify and power off."""
    for ours, floor in _both(kernel, rounds):
        yield Pair(ours.cycle, floor.cycle)


def blackout_ratio(kernel: str, rounds: int) -> Pairs:
    """Compare the blackouts of such guests."""
    for ours, floor in _both(kernel, rounds):
        yield Pair(ours.blackout, floor.blackout)


def lean_blackout_ratio(kernel: str, rounds: int) -> Pairs:
    """Compare the first process in C on the harness's kernel with the same on the leanest one."""
    from benchmarks.floors import first_process
    from pyluo.vm import Kernel
    from pyluo.vm.errors import HarnessError
    from pyluo.vm.kernels.build import build
    from pyluo.vm.kernels.files import IMAGE
    from pyluo.vm.kernels.kconfig import Fragment

    found = Kernel.find(kernel)
    if found.source is None:
        raise HarnessError(f"{kernel} has no source for a lean kernel", "name one of kernels.toml")
    machine = _machine(kernel)
    images = found.image, build(found.source, [Fragment.read(str(LEAN))]) / IMAGE
    ramdisks = [first_process.make_ramdisk_with_kernel(image) for image in images]
    for _ in range(rounds):
        times = [
            _run_floor(replace(machine, image=image), ramdisk, by_serial=True)
            for image, ramdisk in zip(images, ramdisks, strict=True)
        ]
        yield Pair(*(each.blackout for each in times))


def _both(kernel: str, rounds: int) -> Iterator[tuple[Times, Times]]:
    from benchmarks.floors import first_process

    machine = _machine(kernel)
    ramdisk = first_process.make_ramdisk()
    for _ in range(rounds):
        yield _run_vm(kernel), _run_floor(machine, ramdisk)


def _machine(kernel: str) -> Machine:
    """Return the machine of the harness's own guests."""
    from pyluo.vm.machine.accelerator import Choice
    from pyluo.vm.machine.qemu import find_binary

    return patient_vm(kernel).machine(Choice.make(find_binary()).accelerator)


def _run_vm(kernel: str) -> Times:
    began = time.monotonic()
    with patient_vm(kernel) as vm:
        vm.hold(save)
        vm.live_update()
        vm.call(load)
        blackout = vm.timeline.between(REBOOT_CALLED, FIRST_BYTE)
    return Times(time.monotonic() - began, blackout)


def _run_floor(machine: Machine, ramdisk: Path, *, by_serial: bool = False) -> Times:
    from benchmarks.floors import first_process

    seen = first_process.run(machine, ramdisk, by_serial=by_serial)
    cycle = seen[first_process.OFF] - seen[first_process.STARTED]
    return Times(cycle, seen[FIRST_BYTE] - seen[REBOOT_CALLED])


# What runs in the guest:


def make_contents() -> bytes:
    """Return the bytes that are preserved."""
    return bytes((place * 7 + 1) % 256 for place in range(4096)) * (SIZE // 4096)


def save() -> OutgoingSession:
    """Preserve them."""
    ram = Memfd.create("ram", SIZE)
    ram.write(make_contents(), 0)
    with LiveUpdate() as device:
        session = device.create_session("ours")
    session.preserve(ram, 1)
    ram.close()
    return session


def load() -> None:
    """Retrieve them, and compare all."""
    with LiveUpdate() as device:
        session = device.retrieve_session("ours")
    with session.retrieve(1, Memfd) as ram:
        assert ram.read(1, 0) == b"\1"
        mark(FIRST_BYTE)
        assert ram.read(SIZE, 0) == make_contents()
    session.finish()
