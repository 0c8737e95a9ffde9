"""The harness: builds kernels, boots them in QEMU, and live-updates them for real.

The names below are loaded when they are first used, since pytest loads this package in every run,
whether or not a test needs a guest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.guest.wire import Held
    from pyluo.vm.errors import Death, GuestCrash, HarnessError
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.accelerator import Accelerator
    from pyluo.vm.machine.guest import Life
    from pyluo.vm.machine.timeline import Event, Timeline
    from pyluo.vm.machine.vm import VM

__all__ = [
    "VM",
    "Accelerator",
    "Death",
    "Event",
    "GuestCrash",
    "HarnessError",
    "Held",
    "Kernel",
    "Life",
    "Timeline",
]

_HOMES = {
    "VM": "pyluo.vm.machine.vm",
    "Accelerator": "pyluo.vm.machine.accelerator",
    "Death": "pyluo.vm.errors",
    "Event": "pyluo.vm.machine.timeline",
    "GuestCrash": "pyluo.vm.errors",
    "HarnessError": "pyluo.vm.errors",
    "Held": "pyluo.guest.wire",
    "Kernel": "pyluo.vm.kernels.kernel",
    "Life": "pyluo.vm.machine.guest",
    "Timeline": "pyluo.vm.machine.timeline",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
