"""Can this machine run the harness?"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pyluo.doctor.check import Check, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_harness"]

_MODULES = ("jinja2", "pyroute2", "pytest", "qemu.qmp", "rich")
_GIB = 1 << 30


def check_harness() -> Iterator[Check]:
    """Check what the harness needs. Nothing is built; KVM is tried, if that was not done before."""
    missing = [name for name in _MODULES if not _is_installed(name)]
    if missing:
        found = f"{', '.join(missing)}: not installed"
        yield Check("Python packages", Verdict.MISSING, found, "pip install 'pyluo[vm]'")
        return
    yield Check("Python packages", Verdict.READY, "pyluo[vm] is installed")
    yield from _check_qemu()
    yield _check_guests()
    yield _check_tools()
    yield from _check_cache()


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _check_qemu() -> Iterator[Check]:
    from pyluo.vm.errors import HarnessError
    from pyluo.vm.machine.accelerator import Accelerator, Choice
    from pyluo.vm.machine.qemu import find_binary, nests, version

    try:
        qemu = find_binary()
        described = version(qemu)
    except HarnessError as error:
        yield Check("QEMU", Verdict.MISSING, error.problem, error.remedy)
        return
    yield Check("QEMU", Verdict.READY, described)
    try:
        choice = Choice.make(qemu)
    except HarnessError as error:
        yield Check("accelerator", Verdict.MISSING, error.problem, error.remedy)
        return
    except (OSError, subprocess.SubprocessError) as error:
        yield Check("accelerator", Verdict.MISSING, str(error), "PYLUO_ACCEL=tcg does without KVM")
        return
    is_emulated = choice.accelerator is Accelerator.TCG
    verdict = Verdict.LIMITED if is_emulated else Verdict.READY
    remedy = "guests are emulated, which takes some three times as long" if is_emulated else ""
    yield Check("accelerator", verdict, f"{choice.accelerator.value} ({choice.reason})", remedy)
    if is_emulated and not nests(qemu):
        found = f"{described} does not emulate two VMs in one guest"
        yield Check("VMs in guests", Verdict.LIMITED, found, "use QEMU 10 or newer")


def _check_guests() -> Check:
    from pyluo.vm.cores import usable_cores
    from pyluo.vm.machine.capacity import at_once, room_for
    from pyluo.vm.machine.needs import PLAIN

    found = f"{at_once(PLAIN.memory)} at once, with 1 CPU and {PLAIN.memory / _GIB:g} GiB each, on "
    found += f"{usable_cores()} cores"
    if room_for(PLAIN.memory) < 1:
        remedy = "free memory, or raise the limit of the cgroup"
        return Check("guests", Verdict.MISSING, "not one has room in memory", remedy)
    return Check("guests", Verdict.READY, found)


def _check_tools() -> Check:
    from pyluo.vm.kernels.build import missing_packages
    from pyluo.vm.packages import how_to_install

    if missing := missing_packages():
        found = f"{' '.join(missing)}: missing"
        return Check("building kernels", Verdict.MISSING, found, how_to_install(missing))
    return Check("building kernels", Verdict.READY, "the tools are there")


def _check_cache() -> Iterator[Check]:
    from pyluo.vm import cache
    from pyluo.vm.errors import HarnessError
    from pyluo.vm.kernels.build import NEEDED_SPACE

    try:
        folder = cache.folder()
    except HarnessError as error:
        yield Check("cache", Verdict.MISSING, error.problem, error.remedy)
        return
    if not os.access(folder, os.W_OK):
        remedy = "set XDG_CACHE_HOME to a folder that you may write to"
        yield Check("cache", Verdict.MISSING, f"this user may not write to {folder}", remedy)
        return
    free = shutil.disk_usage(folder).free
    kernels = len(list((folder / "kernels").glob("[0-9a-f]*/bzImage")))
    found = f"{folder} has {kernels} kernels, and {free / 1e9:.1f} GB of free space"
    if free < NEEDED_SPACE:
        remedy = f"a build needs {NEEDED_SPACE / 1e9:.1f} GB: free some, or set XDG_CACHE_HOME"
        yield Check("cache", Verdict.LIMITED if kernels else Verdict.MISSING, found, remedy)
        return
    yield Check("cache", Verdict.READY, found)
