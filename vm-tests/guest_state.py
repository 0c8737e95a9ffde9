"""Read the state of a guest, to see whether a test has changed it.

This module runs in the guest, so it imports only pyluo and the standard library.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from pyluo import LiveUpdate, RequestError, kexec
from pyluo.open_sessions import open_sessions

FOLDERS = ("/run", "/run/tmp/upper", "/run/var/tmp/upper", "/dev", "/dev/shm")  # /tmp is an overlay
FILES = (
    "/proc/cmdline", "/proc/swaps", "/proc/sys/kernel/printk", "/proc/sys/kernel/tainted",
    "/proc/sys/vm/memfd_noexec", "/proc/sys/vm/nr_hugepages",
    "/proc/sys/vm/overcommit_memory", "/sys/fs/cgroup/cgroup.procs",
)  # fmt: skip


def read_state() -> dict[str, object]:
    """Return the state of this guest: all that a test may change and later tests may depend on.

    Guests that were booted in the same way have the same state, before and after a jump.
    """
    state: dict[str, object] = {
        "release": os.uname().release,
        "live update": _try_live_update(),
        "sessions": [session.session for session in open_sessions()],
        "next kernel": kexec.loaded(),
        "processes": sorted(filter(None, map(_read_command, _list_numbers("/proc")))),
        "descriptors": len(_list_numbers("/proc/self/fd")),
        "working directory": os.getcwd(),
        "mounts": _read_mounts(),
        "file limit": resource.getrlimit(resource.RLIMIT_NOFILE),
        "memory lock limit": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "ids": (os.getresuid(), os.getresgid()),
    }
    for folder in FOLDERS:
        state[folder] = sorted(os.listdir(folder)) if os.path.exists(folder) else []
    for file in FILES:
        if os.path.exists(file):
            state[file] = Path(file).read_text()
    return state


def _try_live_update() -> str:
    """Create and discard a session; return "works", or the name of the error that was raised."""
    try:
        with LiveUpdate() as device:
            device.create_session("guest_state").discard()
    except RequestError as error:
        return type(error).__name__
    return "works"


def _read_mounts() -> list[list[str]]:
    """Return the source, folder and type of each mount.

    The options are left out: the size of a tmpfs depends on the size of the memory, and after a
    jump, a kernel counts the scratch areas as memory.
    """
    return [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]


def _list_numbers(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in os.listdir(folder) if name.isdecimal()]


def _read_command(process: str) -> str:
    """Return the command line of a process; empty for a kernel thread or a process that ended."""
    try:
        return Path(process, "cmdline").read_text()
    except OSError:
        return ""
