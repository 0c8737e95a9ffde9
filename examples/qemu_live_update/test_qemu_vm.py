"""A Linux in a QEMU lives through live updates between any two kernels: a test to start from.

    make -C examples/qemu_live_update
    pyluo vm matrix --from previous,stable --cpus 2 --memory 4G examples/qemu_live_update/

The guest is the host of the VM. The page of the matrix (`--html`) shows the gap in the VM's life
below each live update, and a clock or a counter of the VM that goes back fails the test.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.guest.port import PAUSED, RESUMED, mark_vm

if TYPE_CHECKING:
    from pyluo.vm import VM

NAME = "vm0"
VMM = Path(__file__).with_name("qemu_live_update.py")
SAID = Path("/tmp/vm0.said")  # what the VM has said on its console
TOLD = Path("/tmp/vm0.told")  # what the VMM has said
PATIENCE = 240.0  # seconds; an emulated host on a busy machine needs many

vmm: subprocess.Popen[bytes]


# What follows runs in the guest.


def start(command: str, *options: str) -> None:
    """Start the VMM, which runs a new VM or resumes one."""
    global vmm
    path = os.pathsep.join([os.fspath(VMM.parent), *sys.path])
    with SAID.open("wb") as stdout, TOLD.open("wb") as stderr:
        vmm = subprocess.Popen(
            [sys.executable, VMM, command, NAME, *options],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"PYTHONPATH": path},
        )


def count(text: str, file: Path) -> int:
    """Return how often a text has appeared in a file; the VMM has to live."""
    assert vmm.poll() is None, TOLD.read_text()
    return file.read_text().count(text)


def read(line: int) -> dict[str, str]:
    """Return the words of a line of the VM's program; of the last one by -1."""
    found = re.findall(r"^vm (boot=.* backwards=\d+)\r?\n", SAID.read_text(), re.MULTILINE)
    return dict(word.split("=") for word in found[line].split())


def options(kernel: str) -> list[str]:
    """Return the VMM's options for a Linux with two CPUs, and QEMU's."""
    return [
        *("--memory", "80", "--", "-accel", "kvm", "-cpu", "host", "-smp", "2"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", "file,id=serial,path=/proc/self/fd/1,append=on", "-serial", "chardev:serial"),
        *("-kernel", kernel, "-initrd", os.fspath(VMM.with_name("guest.cpio"))),
        # noxsave: KVM of an emulated host has a broken XSAVE.
        *("-append", "console=ttyS0 panic=-1 vm.mib=24 noxsave"),
    ]


def pause() -> None:
    """Have the VM paused, and its state stored."""
    mark_vm(NAME, PAUSED)
    vmm.send_signal(signal.SIGUSR1)


def mark(event: str, line: int) -> None:
    """Mark an event in the timeline of the live update, with the VM's own clock and counter."""
    words = read(line)
    mark_vm(NAME, event, clock=int(words["clock"]), counter=int(words["changed0"]))


def end() -> None:
    vmm.send_signal(signal.SIGTERM)
    assert vmm.wait(PATIENCE) == 0, TOLD.read_text()


# And this on your machine.


def wait_for(vm: VM, text: str, file: Path, times: int = 1) -> None:
    """Wait until a text has appeared so often in a file of the guest."""
    deadline = time.monotonic() + PATIENCE
    while vm.call(count, text, file) < times:
        assert time.monotonic() < deadline, f"no {text!r} in {file}"
        time.sleep(0.05)


def test_a_vm_never_notices_a_reboot(vm: VM, hops: int) -> None:
    vm.call(start, "run", *options(os.fspath(vm.kernel.image)))
    wait_for(vm, "backwards=", SAID, 3)
    boot = vm.call(read, -1)["boot"]
    for _ in range(hops):
        vm.call(pause)
        wait_for(vm, "is stored", TOLD)
        vm.call(mark, "stored", -1)
        vm.live_update()
        vm.call(start, "resume")
        wait_for(vm, "runs again", TOLD)
        vm.call(mark_vm, NAME, RESUMED)
        wait_for(vm, "backwards=", SAID, 3)  # the first one may have begun before the jump
        vm.call(mark, "heard again", 0)
        wait_for(vm, "backwards=", SAID, 5)
        line = vm.call(read, -1)
        assert (line["boot"], line["wrong"], line["backwards"]) == (boot, "0", "0")
    vm.call(end)
