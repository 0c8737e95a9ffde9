"""How long a VM pauses when it moves to another build of its VMM.

The mini VMM of the examples moves a VM to a successor through a socket, and through an exec. The
pause is what the VM's own kvmclock says. It must not grow with the VM's memory: the exponent is 0
then. The VM runs in an emulated guest, where everything takes many times what it takes elsewhere.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.guests import patient_vm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.carried import Points

__all__ = ["moves"]

EXAMPLE = Path(__file__).parent.parent / "examples" / "mini_vmm"
PATIENCE = 120.0  # seconds


def moves(kernel: str, sizes: Sequence[int], rounds: int) -> Points:
    """Move VMs with several sizes of memory, in MiB, in one guest."""
    subprocess.run(["make", "-s", "-C", EXAMPLE], check=True)
    with patient_vm(kernel, memory=2 << 30, cpus=2) as vm:
        for _ in range(rounds):
            for size in sizes:
                yield size, vm.call(move, size)


# What runs in the guest:


def move(size: int) -> dict[str, float]:
    """Move a VM with `size` MiB both ways; return the pauses in seconds."""
    program = [sys.executable, os.fspath(EXAMPLE / "mini_vmm.py")]
    options = ["moving", "--socket", "/run/moving.socket"]
    first = _start([*program, "run", *options, "--memory", str(size)])
    _wait_for(first, "runs")
    second = _start([*program, "take-over", *options])
    seen = {"socket": _read_pause(second)}
    assert first.wait(PATIENCE) == 0
    second.send_signal(signal.SIGHUP)
    seen["exec"] = _read_pause(second)
    second.terminate()
    assert second.wait(PATIENCE) == 0
    return seen


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def _wait_for(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise RuntimeError(f"the VMM ended with status {process.wait()}")


def _read_pause(process: subprocess.Popen[str]) -> float:
    found = re.search(r"paused for ([0-9.]+) ms", _wait_for(process, "runs here"))
    assert found is not None
    return float(found[1]) / 1000
