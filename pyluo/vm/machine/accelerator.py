"""The choice between KVM and TCG."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import NamedTuple

from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import kvm

__all__ = ["Accelerator", "Choice"]

_DEVICE = Path("/dev/kvm")
_VARIABLE = "PYLUO_ACCEL"


class Accelerator(enum.Enum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class Choice(NamedTuple):
    """What runs a guest's instructions, and why.

    Attributes:
        accelerator: the accelerator.
        reason: why, in a few words.
        asked: whether the user asked for it.
    """

    accelerator: Accelerator
    reason: str
    asked: bool = False

    @classmethod
    def make(cls, qemu: str, asked: Accelerator | None = None) -> Choice:
        """Return the accelerator that was asked for; by default, KVM if it works, else TCG.

        Args:
            qemu: the path of QEMU.
            asked: the accelerator that the user asked for; None to use PYLUO_ACCEL, if it is set.

        Raises:
            HarnessError: PYLUO_ACCEL is neither kvm nor tcg.
        """
        if asked is not None:
            return cls(asked, "asked for", asked=True)
        if forced := os.environ.get(_VARIABLE):
            try:
                return cls(Accelerator(forced), _VARIABLE, asked=True)
            except ValueError:
                raise HarnessError(f"{_VARIABLE}={forced}", "it is either kvm or tcg") from None
        if not _DEVICE.exists():
            return cls(Accelerator.TCG, f"there is no {_DEVICE}")
        if not os.access(_DEVICE, os.R_OK | os.W_OK):
            return cls(Accelerator.TCG, f"this user may not open {_DEVICE}")
        result = kvm.probe(qemu)
        return cls(Accelerator.KVM if result.works else Accelerator.TCG, result.reason)
