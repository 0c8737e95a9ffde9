"""The record that pyluo loaded an image since this kernel booted.

The kernel does not report which system call loaded an image.
"""

from __future__ import annotations

import os
from contextlib import suppress

from pyluo._sys import kexec_load_exists

__all__ = ["is_loaded_by_file", "remove", "write"]

_RECORD = "/run/pyluo/image"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def write() -> None:
    """Record that pyluo loaded the image.

    If the record cannot be written, `reboot` may refuse the image; that is not an error here.
    """
    with suppress(OSError):
        os.makedirs(os.path.dirname(_RECORD), mode=0o700, exist_ok=True)
        with open(_RECORD, "w") as file:
            file.write(_read(_BOOT_ID))


def remove() -> None:
    """Remove the record, if there is one."""
    with suppress(OSError):
        os.unlink(_RECORD)


def is_loaded_by_file() -> bool:
    """Return whether it is certain that kexec_file_load(2) loaded the image.

    It is certain if pyluo recorded the load, or if this kernel has no other such system call.
    """
    with suppress(OSError):
        if _read(_RECORD) == _read(_BOOT_ID):
            return True
    return not kexec_load_exists()


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()
