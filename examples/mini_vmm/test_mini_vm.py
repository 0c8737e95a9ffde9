"""A VM lives through live updates between any two kernels: a test to start your own from.

    make -C examples/mini_vmm
    pyluo vm matrix --from previous,stable --cpus 2 --memory 2G examples/mini_vmm/

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
VMM = Path(__file__).with_name("mini_vmm.py")
SAID = Path("/tmp/vm0.said")  # what the VM has said on its serial port
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


def read(line: int) -> dict[str, int]:
    """Return the values that a line of the VM has; the last one by -1."""
    found = re.findall(r"^vm (.*)\n", SAID.read_text(), re.MULTILINE)
    return {name: int(value) for name, value in (word.split("=") for word in found[line].split())}


def pause() -> None:
    """Have the VM paused, and its state stored."""
    mark_vm(NAME, PAUSED)
    vmm.send_signal(signal.SIGUSR1)


def mark(event: str, line: int) -> None:
    """Mark an event in the timeline of the live update, with the VM's own clock and counter."""
    values = read(line)
    mark_vm(NAME, event, clock=values["clock"], counter=values["changed0"])


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


def test_a_vm_goes_on_where_it_was(vm: VM, hops: int) -> None:
    vm.call(start, "run", "--memory", "24", "--cpus", "2")
    wait_for(vm, "clock=", SAID, 3)
    for hop in range(1, hops + 1):
        vm.call(pause)
        wait_for(vm, "is stored", TOLD)
        vm.call(mark, "stored", -1)
        vm.live_update()
        vm.call(start, "resume")
        wait_for(vm, "runs again", TOLD)
        vm.call(mark_vm, NAME, RESUMED)
        wait_for(vm, "clock=", SAID, 3)  # the first one may have begun before the jump
        vm.call(mark, "heard again", 0)
        wait_for(vm, "clock=", SAID, 5)
        line = vm.call(read, -1)
        assert line["stopped"] == hop  # the VM was told that it stood still
        assert (line["wrong"], line["backwards"], line["registers"]) == (0, 0, 0)
    vm.call(end)
