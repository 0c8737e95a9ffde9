"""The header of a bzImage, the image of a kernel for x86.

Source: Documentation/arch/x86/boot.rst; arch/x86/kernel/kexec-bzimage64.c, bzImage64_probe()
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Self

__all__ = ["BzImageHeader"]

_SECTOR = 512
_SIZE = 0x260  # bytes from the beginning of the file
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_OLDEST_PROTOCOL = 0x20C
_LOADED_HIGH = 1 << 0  # in loadflags
_KERNEL_64, _ABOVE_4G = 1 << 0, 1 << 1  # in xloadflags
_LONGEST_VERSION = 512  # bytes


@dataclass(frozen=True, slots=True)
class BzImageHeader:
    """What the header of a bzImage says.

    Attributes:
        version: what `uname -r` prints, the builder in parentheses, and what `uname -v` prints;
            empty if it is not there.
        longest_line: the longest command line that the kernel takes, in bytes.
        payload_offset: where the compressed kernel begins in the file, in bytes.
        payload_size: bytes of the compressed kernel.
        obstacle: why kexec_file_load(2) cannot load this image; empty if no reason is known.
    """

    version: str
    longest_line: int
    payload_offset: int
    payload_size: int
    obstacle: str

    @classmethod
    def read(cls, fd: int) -> Self | None:
        """Return the header of a bzImage; None if the file is no bzImage."""
        head = os.pread(fd, _SIZE, 0)
        if head[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
            return None
        head = head.ljust(_SIZE, b"\0")
        (protocol,) = struct.unpack_from("<H", head, 0x206)
        (version,) = struct.unpack_from("<H", head, 0x20E)
        loadflags = head[0x211]
        (xloadflags,) = struct.unpack_from("<H", head, 0x236)
        line, offset, size = struct.unpack_from("<I12xII", head, 0x238)
        setup_size = ((head[0x1F1] or 4) + 1) * _SECTOR
        text = os.pread(fd, _LONGEST_VERSION, _SECTOR + version) if version else b""
        return cls(
            text.split(b"\0", 1)[0].decode("latin-1"),
            line,
            setup_size + offset,
            size,
            _find_obstacle(protocol, loadflags, xloadflags),
        )

    @property
    def release(self) -> str:
        """The release of the kernel, as `uname -r` prints it; empty if it is not there."""
        return self.version.split(" ", 1)[0]


def _find_obstacle(protocol: int, loadflags: int, xloadflags: int) -> str:
    if protocol < _OLDEST_PROTOCOL:
        return "it is older than Linux 3.8: its boot protocol is below 2.12"
    if not loadflags & _LOADED_HIGH:
        return "it is a zImage, which is loaded below 1 MiB: build a bzImage"
    if not xloadflags & _KERNEL_64:
        return "it is a 32-bit kernel: build it with CONFIG_64BIT=y"
    if not xloadflags & _ABOVE_4G:
        return "it cannot be loaded above 4 GiB: build it with CONFIG_RELOCATABLE=y"
    return ""
