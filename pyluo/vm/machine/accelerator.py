"""The choice between KVM and TCG.

On some machines /dev/kvm can be opened and can create guests, but the guests abort or loop for ever
in their first instructions. Therefore KVM is used only if a guest with KVM has run a boot sector.
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
_PROBE_TIMEOUT = 5  # seconds; a boot sector takes a fraction of a second
_SIGNAL = 0x2A
# mov al, 0x2a; out 0xf4, al; hlt. When the guest writes a value to its port, the device
# isa-debug-exit makes QEMU exit with twice the value plus one.
_BOOT_SECTOR = bytes([0xB0, _SIGNAL, 0xE6, 0xF4, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"
_BOOTED = _SIGNAL << 1 | 1


class Accelerator(enum.Enum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"

    @classmethod
    def choose(cls, qemu: str) -> Accelerator:
        """Return the accelerator that PYLUO_ACCEL names; by default, KVM if it works, else TCG.

        Whether KVM works is tested once, and the result is saved until the host boots again.

        Args:
            qemu: the path of QEMU.

        Raises:
            HarnessError: PYLUO_ACCEL is neither kvm nor tcg.
        """
        if forced := os.environ.get(_VARIABLE):
            try:
                return cls(forced)
            except ValueError:
                raise HarnessError(f"{_VARIABLE}={forced}", "it is either kvm or tcg") from None
        if not os.access(_DEVICE, os.R_OK | os.W_OK):
            return cls.TCG
        return cls.KVM if _kvm_works(qemu) else cls.TCG


def _kvm_works(qemu: str) -> bool:
    """Return whether KVM works; the saved result of the test is valid for this boot and QEMU."""
    stat = os.stat(qemu)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    conditions = [boot_id, qemu, stat.st_mtime_ns]
    file = cache.folder() / "kvm.json"
    try:
        saved = json.loads(file.read_text())
        if saved["case"] == conditions:
            return bool(saved["works"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    works = _try_kvm(qemu)
    cache.write(file, json.dumps({"case": conditions, "works": works}))
    return works


def _try_kvm(qemu: str) -> bool:
    """Return whether KVM can run a boot sector."""
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
