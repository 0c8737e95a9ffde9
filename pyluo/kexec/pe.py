"""The sections of a PE file, the format of EFI programs and so of unified kernel images.

Source: Microsoft's PE Format; include/linux/pe.h
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

__all__ = ["Section", "read_sections"]

_DOS_MAGIC, _MAGIC = b"MZ", b"PE\0\0"
_DOS_HEADER = struct.Struct("<2s58xI")  # the magic number, and where the PE header is
_HEADER = struct.Struct("<4s2xH12xH2x")  # the magic number, how many sections, size of the rest
_SECTION = struct.Struct("<8sI4xII16x")  # the name, the size in memory, size and offset in the file


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a PE file.

    Attributes:
        name: the name, such as ``.linux``.
        offset: where the section begins in the file, in bytes.
        size: bytes.
    """

    name: str
    offset: int
    size: int


def read_sections(fd: int) -> tuple[Section, ...] | None:
    """Return the sections of a PE file in their order; None if the file is no PE file.

    A section that reaches beyond the end of the file is left out.
    """
    head = os.pread(fd, _DOS_HEADER.size, 0)
    if len(head) < _DOS_HEADER.size:
        return None
    dos_magic, start = _DOS_HEADER.unpack(head)
    header = os.pread(fd, _HEADER.size, start)
    if dos_magic != _DOS_MAGIC or len(header) < _HEADER.size:
        return None
    magic, count, rest = _HEADER.unpack(header)
    if magic != _MAGIC:
        return None
    table = os.pread(fd, count * _SECTION.size, start + _HEADER.size + rest)
    table = table[: len(table) // _SECTION.size * _SECTION.size]
    file_size = os.fstat(fd).st_size
    sections = []
    for name, used, size, offset in _SECTION.iter_unpack(table):
        # In the file, a section is padded; of what it has in memory, the end may be missing there.
        section = Section(name.rstrip(b"\0").decode("latin-1"), offset, min(used or size, size))
        if offset + section.size <= file_size:
            sections.append(section)
    return tuple(sections)
