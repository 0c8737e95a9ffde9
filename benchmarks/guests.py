"""The guests of the bench: they may be as slow as the machine is busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm import VM

__all__ = ["patient_vm"]


def patient_vm(
    kernel: str,
    *,
    memory: int | None = None,
    cpus: int = 1,
    devices: Sequence[str] = (),
    append: str = "",
) -> VM:
    """Return a guest that counts as dead only after minutes; see `VM` for the arguments."""
    from pyluo.vm import VM  # see `VM._start`: a guest imports this module as well

    return VM(
        kernel, memory=memory, cpus=cpus, devices=devices, append=append,
        boot_timeout=300, call_timeout=900, silence=180,
    )  # fmt: skip
