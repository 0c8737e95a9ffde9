"""Measure for how long a VM pauses when it moves to another build of its VMM.

The mini VMM of the examples moves a VM to a successor through a socket, and through an exec. The
pause is what the VM's own kvmclock says. It must not grow with the VM's memory: the exponent that
is fitted to the pauses of several sizes is 0 then. The VM runs in an emulated guest, where
everything takes many times what it takes elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import curves
from pyluo.vm import VM

SIZES = (32, 128, 512)  # MiB
EXAMPLE = Path(__file__).parent.parent / "examples" / "mini_vmm"
PATIENCE = 120.0  # seconds


def main() -> None:
    arguments = curves.parse(__doc__, SIZES)
    subprocess.run(["make", "-s", "-C", EXAMPLE], check=True)
    with VM(arguments.kernel, memory=2 << 30, cpus=2, call_timeout=600, silence=120) as vm:
        measured = curves.measure("moves", arguments, lambda size: vm.call(move, size))
    if arguments.json:
        print(json.dumps(measured))
    else:
        show(measured)


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


# What is made of the times:


def show(measured: curves.Measured) -> None:
    """Print a table with the medians, and the exponents."""
    sizes = list(measured["socket"])
    table = Table("paused", *(f"{size} MiB" for size in sizes), "exponent", box=None)
    for what, by_size in measured.items():
        cells = [
            f"{statistics.median(seconds) * 1000:.1f} ms "
            f"({min(seconds) * 1000:.1f}-{max(seconds) * 1000:.1f})"
            for seconds in by_size.values()
        ]
        table.add_row(what, *cells, f"{curves.fit_exponent(by_size):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
