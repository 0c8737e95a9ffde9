"""KVM where it works, TCG elsewhere.

A machine can have a /dev/kvm that opens and creates guests which then abort, or loop for ever in
their first instructions. So KVM has to boot something before it is trusted.
"""

from __future__ import annotations

import enum
import json
import os
import subprocess
import tempfile
from pathlib import Path

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import cache

__all__ = ["Accelerator"]

_DEVICE = Path("/dev/kvm")
_VARIABLE = "PYLUO_ACCEL"
_PROBE_TIMEOUT = 5  # seconds; a boot sector takes a fraction of one
_SIGNAL = 0x2A
# mov al, 0x2a; out 0xf4, al; hlt: QEMU's debug-exit device ends QEMU with twice that plus one.
_BOOT_SECTOR = bytes([0xB0, _SIGNAL, 0xE6, 0xF4, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"
_BOOTED = _SIGNAL << 1 | 1


class Accelerator(enum.Enum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"

    @classmethod
    def choose(cls, qemu: str) -> Accelerator:
        """The one that PYLUO_ACCEL names; without it, KVM if it can boot a guest here, else TCG.

        Args:
            qemu: the path of QEMU. The verdict on KVM is remembered until the host boots again.

        Raises:
            HarnessError: PYLUO_ACCEL names neither.
        """
        if forced := os.environ.get(_VARIABLE):
            try:
                return cls(forced)
            except ValueError:
                raise HarnessError(f"{_VARIABLE}={forced}", "it is either kvm or tcg") from None
        if not os.access(_DEVICE, os.R_OK | os.W_OK):
            return cls.TCG
        return cls.KVM if _remembered(qemu) else cls.TCG


def _remembered(qemu: str) -> bool:
    """Whether KVM works, asked once for each boot of the host, each QEMU and each user."""
    stat = os.stat(qemu)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    case = [boot_id, qemu, stat.st_mtime_ns]
    memory = cache.folder() / "kvm.json"
    try:
        known = json.loads(memory.read_text())
        if known["case"] == case:
            return bool(known["works"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    works = _boots(qemu)
    cache.write(memory, json.dumps({"case": case, "works": works}))
    return works


def _boots(qemu: str) -> bool:
    with tempfile.TemporaryFile() as image:
        image.write(_BOOT_SECTOR.ljust(1440 << 10, b"\0"))
        image.flush()
        # Of a harness that is killed here, this is left until its time is over. An interrupted one
        # kills `timeout`, and so QEMU.
        command = ["timeout", "--signal=KILL", str(_PROBE_TIMEOUT)]
        command += ["setpriv", "--pdeathsig", "KILL", "--"]
        command += [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "64M"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01", "-boot", "order=c"]
        command += ["-drive", f"file=/proc/self/fd/{image.fileno()},format=raw,if=ide,snapshot=on"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[image.fileno()],
            )
        except OSError:
            return False
    return done.returncode == _BOOTED
