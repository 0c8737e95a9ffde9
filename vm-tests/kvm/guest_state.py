"""Saving a VM and restoring another one from it, in one process, without a store."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from kvm import guest_vmm
from pyluo import GuestRam, kvm

if TYPE_CHECKING:
    from collections.abc import Mapping

# MSRs that count time: the TSC, and two of Hyper-V's.
_COUNTING = {0x10, 0x40000010, 0x40000020}
# What goes on counting while a VM is paused: KVM computes the present value when it is asked.
_TIMER_COUNT = range(0x390, 0x394)  # in the local APIC
_LOAD_TIMES = [range(start, start + 8) for start in (16, 40, 64)]  # in the PIT's channels


class Quiet:
    """A VM whose output is collected."""

    def __init__(self, ram: GuestRam, cpus: int) -> None:
        sys.path.insert(0, str(guest_vmm.MINI_VMM.parent))
        example: Any = importlib.import_module("machine")
        self.machine = example.Machine(ram, cpus)
        self.said = bytearray()
        self.machine.serial.access = self._access

    def _access(self, event: kvm.PortAccess) -> None:
        if event.is_write:
            self.said += event.data
        else:
            event.data[:] = b"\x60" * len(event.data)

    def run_until(self, lines: int) -> None:
        """Run the VM until it has said this many lines, and pause it."""
        self.machine.start()
        deadline = time.monotonic() + guest_vmm.PATIENCE
        while self.said.count(b"\n") < lines:
            assert not self.machine.failure, self.machine.failure
            assert time.monotonic() < deadline, bytes(self.said)
            time.sleep(0.05)
        self.machine.pause()


def differences_after_restoring(cpus: int) -> list[str]:
    """Save a VM, restore another one from it, and save that one; name the parts that differ.

    The VM that was restored must then go on. All this happens in a process of its own, whose main
    thread can have handlers of signals.
    """
    script = f"from kvm import guest_state; guest_state.print_differences({cpus})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    differences: list[str] = json.loads(done.stdout)
    return differences


def print_differences(cpus: int) -> None:
    """Print them as JSON."""
    program = guest_vmm.MINI_VMM.with_name("program.elf")
    with GuestRam.create("state", 24 << 20) as ram:
        first = Quiet(ram, cpus)
        first.machine.load(program)
        first.run_until(2)
        before = kvm.VmState.from_bytes(first.machine.save().to_bytes())
        second = Quiet(ram, cpus)
        restored = kvm.restore(second.machine.vm, second.machine.vcpus, before)
        after = second.machine.save()
        found = _differences("VM", before.parts, after.parts, restored)
        for one, other in zip(before.vcpus, after.vcpus, strict=True):
            found += _differences(f"vCPU {one.number}", one.parts, other.parts, restored)
        second.run_until(2)
        print(json.dumps(found))


def _differences(
    subject: str, before: Mapping[str, bytes], after: Mapping[str, bytes], restored: kvm.Restored
) -> list[str]:
    assert list(before) == list(after)
    found = []
    for name, data in before.items():
        one, other = bytearray(data), bytearray(after[name])
        if name == "msrs":
            msrs, now = _msrs(data, restored), _msrs(after[name], restored)
            found += [
                f"{subject}: MSR {index:#x} was {value:#x}, is {now[index]:#x}"
                for index, value in msrs.items()
                if value != now[index]
            ]
            continue
        for moving in {"lapic": [_TIMER_COUNT], "pit": _LOAD_TIMES}.get(name, ()):
            one[moving.start : moving.stop] = other[moving.start : moving.stop] = bytes(len(moving))
        pairs = zip(one, other, strict=True)
        if places := [place for place, (a, b) in enumerate(pairs) if a != b]:
            found.append(f"{subject}: {name} at {places}")
    return found


def _msrs(data: bytes, restored: kvm.Restored) -> dict[int, int]:
    left_out = {*_COUNTING, *restored.dropped_msrs}
    entries = struct.iter_unpack("=IIQ", data)
    return {index: value for index, _, value in entries if index not in left_out}
