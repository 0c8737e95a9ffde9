"""A processor that does nothing any more.

Source: Documentation/fault-injection/provoke-crashes.rst; drivers/misc/lkdtm/bugs.c
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress

from pyluo.guest.faults.missing import FaultMissingError

__all__ = ["lock_up_cpu"]

_TRIGGER = "/sys/kernel/debug/provoke-crash/DIRECT"
_WORD = "HARDLOCKUP"
_PATIENCE = 10.0  # seconds
_GLANCE = 0.05


def lock_up_cpu() -> int:
    """Keeps a processor busy with its interrupts off, from now on and until the machine is reset.

    It is the last one. Where it is the only one, all of the guest stops, and this does not return.
    Where there are others, it has to be set apart by ``isolcpus=`` and ``irqaffinity=``: the kernel
    would wait for it in a page fault of any process that it has ever run.

    Returns:
        The number of the processor.

    Raises:
        FaultMissingError: the kernel has no CONFIG_LKDTM.
        RuntimeError: it is not set apart.
        TimeoutError: the kernel did not say that it began.
    """
    if not os.path.exists(_TRIGGER):
        raise FaultMissingError("lockup on demand", "CONFIG_LKDTM")
    last = os.sysconf("SC_NPROCESSORS_ONLN") - 1
    if last and _isolated() != str(last):
        raise RuntimeError(
            f"processor {last} is not set apart: boot with isolcpus={last} irqaffinity=0"
        )
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.lseek(log, 0, os.SEEK_END)
        if not os.fork():
            try:
                os.sched_setaffinity(0, [last])
                with open(_TRIGGER, "w") as file:
                    file.write(_WORD)
            finally:
                os._exit(1)
        _wait_for_the_word(log)
    finally:
        os.close(log)
    return last


def _isolated() -> str:
    with open("/sys/devices/system/cpu/isolated") as file:
        return file.read().strip()


def _wait_for_the_word(log: int) -> None:
    """Reads the kernel's log until it says that the lockup comes now."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        # Again and again, since it is the processor in question that would have to wake us.
        select.select([log], [], [], _GLANCE)
        with suppress(BlockingIOError):
            if _WORD.encode() in os.read(log, 8192):
                return
    raise TimeoutError(f"the kernel did not say within {_PATIENCE:g} s that a processor locks up")
