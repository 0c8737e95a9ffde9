"""The pause of a VM in QEMU over a live update of its host, and the blackout of the same jump.

The host is a guest itself, so that the VM runs by KVM in an emulated machine, mostly.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES.parent))

from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair
from examples.qemu_live_update import test_qemu_vm as example
from pyluo.guest import port

if TYPE_CHECKING:
    from benchmarks.ratios import Pairs
    from pyluo.vm import VM

__all__ = ["vm_pause_ratio"]


def vm_pause_ratio(kernel: str, rounds: int) -> Pairs:
    """Live-update the host of one VM again and again."""
    subprocess.run(["make", "-s", "-C", EXAMPLES / "qemu_live_update"], check=True)
    with patient_vm(kernel, memory=4 << 30, cpus=2) as vm:
        vm.call(example.start, "run", *example.options(str(vm.kernel.image)))
        example.wait_for(vm, "backwards=", example.SAID, 3)
        for _ in range(rounds):
            yield _live_update(vm)
        vm.call(example.end)


def _live_update(vm: VM) -> Pair:
    vm.call(pause)
    vm.live_update()
    vm.call(resume)
    [gap] = vm.timeline.gaps
    assert gap.length is not None
    example.wait_for(vm, "backwards=", example.SAID, 3)
    return Pair(gap.length, vm.timeline.blackout)


# What runs in the guest, which sees sooner than the host what the VMM has said:


def pause() -> None:
    """Pause the VM, and wait until its state is stored."""
    example.pause()
    _wait_for("is stored")


def resume() -> None:
    """Start the VM again, and mark when it runs."""
    example.start("resume")
    _wait_for("runs again")
    port.mark_vm(example.NAME, port.RESUMED)


def _wait_for(text: str) -> None:
    deadline = time.monotonic() + example.PATIENCE
    while not example.count(text, example.TOLD):
        assert time.monotonic() < deadline, f"no {text!r} in {example.TOLD}"
        time.sleep(0.02)
