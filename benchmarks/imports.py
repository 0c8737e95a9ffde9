"""`python -c "import pyluo"` in the guest, and `python -c pass`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair

if TYPE_CHECKING:
    from benchmarks.ratios import Pairs

__all__ = ["import_ratio"]


def import_ratio(kernel: str, rounds: int) -> Pairs:
    """Start Python, import pyluo and end; in the environment of this process."""
    path = os.environ.get("PYTHONPATH")
    with patient_vm(kernel) as vm:
        for program in ("pass", "import pyluo"):  # which reads the files for the first time
            vm.call(run_python, program, path)
        for _ in range(rounds):
            above = vm.call(run_python, "import pyluo", path)
            yield Pair(above, vm.call(run_python, "pass", path))


# What runs in the guest:


def run_python(program: str, path: str | None) -> float:
    """Run a program of one line, and return the seconds from its start to its end."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return time.perf_counter() - began
