"""Ways to bring a kernel down, or to make it complain."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

_MEMBARRIER, _GLOBAL = 324, 1  # asm/unistd_64.h, linux/membarrier.h


def provoke(what: str) -> None:
    """One of LKDTM's crash points, in a guest of the kernel `selftest` or `debug`.

    Source: drivers/misc/lkdtm/
    """
    Path("/sys/kernel/debug/provoke-crash/DIRECT").write_text(what)


def provoke_soon(what: str) -> None:
    """The same, when the caller has its answer."""
    threading.Timer(0.2, provoke, [what]).start()


def lock_up_while_rcu_waits() -> None:
    """A CPU that never comes to rest is no stall as long as nobody waits for it to."""
    if not os.fork():
        while True:
            ctypes.CDLL(None).syscall(_MEMBARRIER, _GLOBAL, 0, 0)
    provoke("SOFTLOCKUP")
