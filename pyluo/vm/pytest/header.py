"""The lines that the plugin adds to pytest's header: the accelerator, QEMU and the kernels that
this test run uses.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from pyluo.vm.cores import usable_cores
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine.accelerator import Accelerator, Choice
from pyluo.vm.machine.capacity import at_once
from pyluo.vm.machine.needs import PLAIN
from pyluo.vm.machine.qemu import find_binary, version

if TYPE_CHECKING:
    import pytest

__all__ = ["describe"]


def describe(config: pytest.Config) -> list[str]:
    """Return the lines: the accelerator and why it was chosen, the version of QEMU, the kernels,
    and how many guests can run at the same time.
    """
    try:
        qemu = find_binary()
        asked = config.getoption("--pyluo-accel")
        choice = Choice.make(qemu, Accelerator(asked) if asked else None)
        runs = f"{choice.accelerator.value} ({choice.reason}), {version(qemu)}"
    except (HarnessError, OSError, subprocess.SubprocessError) as error:
        runs = f"none: {error}"
    kernel, to = (config.getoption(f"--pyluo-{name}") for name in ("kernel", "to"))
    memory = config.getoption("--pyluo-memory") or PLAIN.memory
    fit = at_once(memory, config.getoption("--pyluo-cpus"))
    kernels = f"{kernel} to {to}" if to else kernel
    return [
        f"guests: {runs}",
        f"guests: kernel {kernels}; {fit} at once on {usable_cores()} cores",
    ]
