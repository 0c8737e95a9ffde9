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


def provoke(point: str) -> None:
    """Trigger one of LKDTM's crash points; the kernels `selftest` and `debug` have them.

    Source: drivers/misc/lkdtm/
    """
    Path("/sys/kernel/debug/provoke-crash/DIRECT").write_text(point)


def provoke_soon(point: str) -> None:
    """Trigger a crash point after the caller has got its answer."""
    threading.Timer(0.2, provoke, [point]).start()


def lock_up_both_cpus() -> None:
    """Lock up both of two CPUs, of which the second is isolated."""
    lock_up_cpu()
    os.sched_setaffinity(0, [0])
    provoke("HARDLOCKUP")


def block_reboot() -> None:
    """Make every later live update wait forever where it calls reboot()."""
    kexec.reboot = lambda **_: threading.Event().wait()  # type: ignore[assignment]


def panic_without_console() -> None:
    """Panic without a console, so that only the hypervisor learns of it."""
    Path("/sys/class/tty/ttyS0/console").write_text("N")
    provoke("PANIC")


def reset() -> None:
    Path("/proc/sysrq-trigger").write_text("b")


def return_with_spinlock() -> None:
    """Return to user space with a spinlock held, and then close a file, which may sleep.

    The process has a real-time priority: if another one preempted it in between, the scheduler
    would complain of that instead.
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
    """Start a process of this name, and return when it sleeps in pause(2)."""
    child = os.fork()
    if not child:
        Path("/proc/self/comm").write_text(name)
        while True:
            signal.pause()
    while "pause" not in Path(f"/proc/{child}/wchan").read_text():
        time.sleep(0.01)


def lock_up_while_rcu_waits() -> None:
    """Lock up a CPU while a grace period waits for it; otherwise RCU would report no stall."""
    if not os.fork():
        while True:
            ctypes.CDLL(None).syscall(_MEMBARRIER, _GLOBAL, 0, 0)
    provoke("SOFTLOCKUP")
