"""Whether KVM works on this machine.

On some machines /dev/kvm can be opened and can create guests, but the guests abort or loop for ever
in their first instructions; on others they run a boot sector, and no kernel. Therefore KVM has to
run a boot sector before a guest uses it, and counts as proven only when a kernel has come up in it.
The result is saved in the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pyluo.vm import cache

__all__ = ["Result", "distrust", "probe", "prove"]

_PROBE_TIMEOUT = 5  # seconds; a boot sector takes a fraction of a second
# Seconds after which the probe is made again if the boot sector did not run in time: the machine
# may only have been slow.
_DOUBT = 600
_SIGNAL = 0x2A
# mov al, 0x2a; out 0xf4, al; hlt. When the guest writes a value to its port, the device
# isa-debug-exit makes QEMU exit with twice the value plus one.
_BOOT_SECTOR = bytes([0xB0, _SIGNAL, 0xE6, 0xF4, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"
_BOOTED = _SIGNAL << 1 | 1
_KILLED = -9  # what `timeout --signal=KILL` does to itself as well


class Result(NamedTuple):
    """What is known of KVM.

    Attributes:
        works: whether guests may use it.
        proven: whether a kernel has come up in it.
        reason: why, in a few words.
        until: the time, in seconds since the epoch, after which the result is not valid any more; 0
            if it is valid until the host boots again, or QEMU changes.
    """

    works: bool
    proven: bool
    reason: str
    until: float = 0


def probe(qemu: str) -> Result:
    """Return the saved result; if there is none, let KVM run a boot sector first.

    Args:
        qemu: the path of QEMU.
    """
    saved = _read(qemu)
    if saved is not None and (not saved.until or time.time() < saved.until):
        return saved
    result = _run_boot_sector(qemu)
    _save(qemu, result)
    return result


def prove(qemu: str) -> None:
    """Save that a kernel has come up in KVM."""
    if (saved := _read(qemu)) is None or not saved.proven:
        _save(qemu, Result(works=True, proven=True, reason="a kernel has come up in it"))


def distrust(qemu: str) -> None:
    """Save that KVM runs no kernel, although it ran a boot sector."""
    reason = "KVM runs a boot sector, but a kernel hangs before its first line"
    _save(qemu, Result(works=False, proven=False, reason=reason))


def _file() -> Path:
    return cache.folder() / "kvm.json"


def _conditions(qemu: str) -> list[object]:
    """Return what the result depends on: this boot of the host, and QEMU."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot_id, qemu, os.stat(qemu).st_mtime_ns]


def _read(qemu: str) -> Result | None:
    try:
        saved = json.loads(_file().read_text())
        return Result(*saved["result"]) if saved["conditions"] == _conditions(qemu) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(qemu: str, result: Result) -> None:
    with suppress(OSError):  # the cache may be read-only; the probe is made again then
        cache.write(_file(), json.dumps({"conditions": _conditions(qemu), "result": result}))


def _run_boot_sector(qemu: str) -> Result:
    with tempfile.TemporaryFile() as image:
        image.write(_BOOT_SECTOR.ljust(1440 << 10, b"\0"))
        image.flush()
        # QEMU must not run on. If this process is killed, `timeout` still kills QEMU in time. If
        # this process is interrupted, it kills `timeout`, whose death kills QEMU (--pdeathsig).
        command = ["timeout", "--signal=KILL", str(_PROBE_TIMEOUT)]
        command += ["setpriv", "--pdeathsig", "KILL", "--"]
        command += [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "64M"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01", "-boot", "order=c"]
        command += ["-drive", f"file=/proc/self/fd/{image.fileno()},format=raw,if=ide,snapshot=on"]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[image.fileno()],
        )
    if done.returncode == _BOOTED:
        return Result(works=True, proven=False, reason="it runs a boot sector")
    if done.returncode in (_KILLED, 128 - _KILLED):
        reason = f"KVM did not run a boot sector within {_PROBE_TIMEOUT} s"
        return Result(works=False, proven=False, reason=reason, until=time.time() + _DOUBT)
    reason = f"with KVM, QEMU ended with status {done.returncode}"
    return Result(works=False, proven=False, reason=reason)
