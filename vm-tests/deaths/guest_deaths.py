"""Ways to bring a kernel down, or to make it complain."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

from pyluo import kexec
from pyluo.guest.faults import lock_up_cpu

_MEMBARRIER, _GLOBAL = 324, 1  # asm/unistd_64.h, linux/membarrier.h


def provoke(what: str) -> None:
    """One of LKDTM's crash points, in a guest of the kernel `selftest` or `debug`.

    Source: drivers/misc/lkdtm/
    """
    Path("/sys/kernel/debug/provoke-crash/DIRECT").write_text(what)


def provoke_soon(what: str) -> None:
    """The same, when the caller has its answer."""
    threading.Timer(0.2, provoke, [what]).start()


def lock_up_both() -> None:
    """Each of two processors, of which the second is set apart."""
    lock_up_cpu()
    os.sched_setaffinity(0, [0])
    provoke("HARDLOCKUP")


def never_leave() -> None:
    """From now on a live update goes no further than its call of reboot()."""
    kexec.reboot = lambda **_: threading.Event().wait()  # type: ignore[assignment]


def panic_unheard() -> None:
    """A panic whose console has been taken away: what is left is to tell the hypervisor."""
    Path("/sys/class/tty/ttyS0/console").write_text("N")
    provoke("PANIC")


def reset() -> None:
    Path("/proc/sysrq-trigger").write_text("b")


def keep_a_lock() -> None:
    """A process returns to user space with a spinlock held, and closes a file with it, by which
    the kernel may sleep.

    It goes before all others, so that none takes its processor between the two, of which the
    scheduler would complain instead.
    """
    child = os.fork()
    if not child:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        try:
            provoke("SPINLOCKUP")
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def banner() -> str:
    return Path("/proc/version").read_text()


def leave_sleeper(name: str) -> None:
    """A process of this name that sleeps in pause(2), when this returns."""
    child = os.fork()
    if not child:
        Path("/proc/self/comm").write_text(name)
        while True:
            signal.pause()
    while "pause" not in Path(f"/proc/{child}/wchan").read_text():
        time.sleep(0.01)


def lock_up_while_rcu_waits() -> None:
    """A CPU that never comes to rest is no stall as long as nobody waits for it to."""
    if not os.fork():
        while True:
            ctypes.CDLL(None).syscall(_MEMBARRIER, _GLOBAL, 0, 0)
    provoke("SOFTLOCKUP")
