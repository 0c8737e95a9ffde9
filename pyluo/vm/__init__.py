"""The harness: builds kernels and roots, boots them in QEMU guests, and live-updates the guests.

In this package, a *jump* is the kexec of a live update: the old kernel starts the new one. A *life*
is one boot of a guest: it begins with the cold boot or with a jump, and ends with the next jump. A
guest has *spoken*, or is up, when the worker in it (`pyluo.guest.worker`) has sent its first
message of this life.

The packages are `kernels`, `roots`, `machine`, `results`, `run`, `terminal` and `pytest`. A package
may import the packages named before it, and none of those named after it.

The names in `__all__` are imported when they are first used, because pytest imports this package in
every run, whether or not a test needs a guest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.guest.wire import GuestObject
    from pyluo.vm.errors import (
        Complaint,
        Death,
        GuestCrash,
        GuestFailure,
        HarnessError,
        KernelComplaint,
        VmRegression,
    )
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.accelerator import Accelerator
    from pyluo.vm.machine.lives import Life
    from pyluo.vm.machine.timeline import Event, Gap, Jump, Timeline, VmEvent
    from pyluo.vm.machine.vm import VM
    from pyluo.vm.roots.root import Root

__all__ = [
    "VM",
    "Accelerator",
    "Complaint",
    "Death",
    "Event",
    "Gap",
    "GuestCrash",
    "GuestFailure",
    "GuestObject",
    "HarnessError",
    "Jump",
    "Kernel",
    "KernelComplaint",
    "Life",
    "Root",
    "Timeline",
    "VmEvent",
    "VmRegression",
]

_MODULES = {
    "VM": "pyluo.vm.machine.vm",
    "Accelerator": "pyluo.vm.machine.accelerator",
    "Complaint": "pyluo.vm.errors",
    "Death": "pyluo.vm.errors",
    "Event": "pyluo.vm.machine.timeline",
    "Gap": "pyluo.vm.machine.timeline",
    "GuestCrash": "pyluo.vm.errors",
    "GuestFailure": "pyluo.vm.errors",
    "GuestObject": "pyluo.guest.wire",
    "HarnessError": "pyluo.vm.errors",
    "Jump": "pyluo.vm.machine.timeline",
    "Kernel": "pyluo.vm.kernels.kernel",
    "KernelComplaint": "pyluo.vm.errors",
    "Life": "pyluo.vm.machine.lives",
    "Root": "pyluo.vm.roots.root",
    "Timeline": "pyluo.vm.machine.timeline",
    "VmEvent": "pyluo.vm.machine.timeline",
    "VmRegression": "pyluo.vm.errors",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
