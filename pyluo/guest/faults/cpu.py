"""A processor that locks up.

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
_CRASH_TYPE = "HARDLOCKUP"
_TIMEOUT = 10.0  # seconds
_POLL_INTERVAL = 0.05


def lock_up_cpu() -> int:
    """Keep the last processor busy, with its interrupts off, until the machine is reset.

    If there is only one processor, the whole guest stops, and this function does not return.
    Otherwise the last processor must be set apart by ``isolcpus=`` and ``irqaffinity=``: a page
    fault of a process that has ever run on that processor makes the kernel wait for it.

    Returns:
        The number of the last processor.

    Raises:
        FaultMissingError: the kernel has no CONFIG_LKDTM.
        RuntimeError: the last processor is not set apart.
        TimeoutError: the kernel did not log that the lockup begins.
    """
    if not os.path.exists(_TRIGGER):
        raise FaultMissingError("lockup on demand", "CONFIG_LKDTM")
    last = os.sysconf("SC_NPROCESSORS_ONLN") - 1
    if last and _read_isolated_cpus() != str(last):
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
                    file.write(_CRASH_TYPE)
            finally:
                os._exit(1)
        _wait_for_lockup(log)
    finally:
        os.close(log)
    return last


def _read_isolated_cpus() -> str:
    with open("/sys/devices/system/cpu/isolated") as file:
        return file.read().strip()


def _wait_for_lockup(log: int) -> None:
    """Read the kernel's log until it announces the lockup."""
    end = time.monotonic() + _TIMEOUT
    while time.monotonic() < end:
        # Do not wait without a timeout: the kernel may leave it to the locked-up processor to wake
        # this process when a line comes.
        select.select([log], [], [], _POLL_INTERVAL)
        with suppress(BlockingIOError):
            if _CRASH_TYPE.encode() in os.read(log, 8192):
                return
    raise TimeoutError(f"the kernel did not log within {_TIMEOUT:g} s that a processor locks up")
