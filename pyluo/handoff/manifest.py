"""What is handed over, in a sealed memfd: how descriptors are called and known, and the state.

It goes through a socket and through exec alike. Neither has room for a state of many mebibytes: a
packet is bounded by the socket's buffer, an environment by the kernel. Its seals make it one that
can be checked first and believed afterwards, whoever else has it open. Its layout::

    bytes 0-7    magic
    bytes 8-11   version of what follows
    bytes 12-15  number of entries
    bytes 16-23  process that makes itself the successor by exec; 0 for a socket
    bytes 24-31  length of the table, in bytes
    bytes 32-39  length of the state, in bytes
    bytes 40-71  SHA-256 of all of it, with zeros in place of this field
    table        for each entry: descriptor (-1 for a socket), st_dev, st_ino, kind of file,
                 length of the name, name in UTF-8
    state

All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from errno import E2BIG, EBADMSG, EPROTONOSUPPORT
from typing import TYPE_CHECKING, Self

from pyluo._sys import raising
from pyluo.errors import HandoffError
from pyluo.memfd import Memfd, Seal, read_seals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Entry", "Manifest"]

_MAGIC = b"pyluoHOM"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ32s")
_ENTRY = struct.Struct("<iQQIH")
_MAX_NAME = 255  # bytes
_SEALS = Seal.SEAL | Seal.SHRINK | Seal.GROW | Seal.WRITE
_OPERATION = "read handoff"


@dataclass(frozen=True, slots=True)
class Entry:
    """A descriptor, and the file that it has to be of.

    Attributes:
        name: by which both sides know it.
        number: of the descriptor, the same before an exec and after it; -1 for a socket.
        device: st_dev of the file.
        inode: st_ino; all files of no file system (eventfd, iommufd, …) have the same.
        kind: the format bits of st_mode; 0 for those.
    """

    name: str
    number: int
    device: int
    inode: int
    kind: int

    @classmethod
    def of(cls, name: str, fd: int, number: int = -1) -> Self:
        """Describes an open descriptor.

        Raises:
            OSError: EBADF, it is not open.
        """
        status = os.fstat(fd)
        return cls(name, number, status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode))

    def matches(self, fd: int) -> bool:
        """Whether this may be the file.

        Raises:
            OSError: EBADF, the descriptor is not open.
        """
        return Entry.of(self.name, fd, self.number) == self


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is handed over, except for the descriptors themselves.

    Attributes:
        entries: in the order in which the descriptors go.
        state: what the caller hands over with them.
        pid: of the process that hands over to itself, by exec; 0 for a socket.
    """

    entries: tuple[Entry, ...]
    state: bytes
    pid: int = 0

    def to_memfd(self) -> Memfd:
        """A memfd with all of it, which nobody can change any more.

        Raises:
            ValueError: a name is empty, or longer than 255 bytes in UTF-8.
            LuoError: as `Memfd.create` and `Memfd.write` do.
        """
        table = b"".join(map(_pack, self.entries))
        lengths = len(self.entries), self.pid, len(table), len(self.state)
        digest = _digest(lengths, table, self.state)
        memfd = Memfd.create("pyluo-handoff", 0)
        try:
            memfd.write(_HEADER.pack(_MAGIC, _VERSION, *lengths, digest), 0)
            memfd.write(table, _HEADER.size)
            memfd.write(self.state, _HEADER.size + len(table))
            memfd.seal(_SEALS)
        except BaseException:
            memfd.close()
            raise
        return memfd

    @classmethod
    def read(cls, fd: int, *, max_files: int | None = None, max_state: int | None = None) -> Self:
        """Reads a descriptor that may be of anything; it stays the caller's.

        Args:
            fd: the descriptor.
            max_files: number of entries to read at most.
            max_state: bytes of state to read at most.

        Raises:
            HandoffError: EBADMSG, it is no manifest, or a damaged one; EPROTONOSUPPORT, it is of
                another version; E2BIG, it says more than that; ENOMEM.
        """
        # What is not sealed could block a read for ever, or change after its digest was checked.
        if read_seals(fd) & _SEALS != _SEALS:
            raise _damage_error("it is no sealed memfd")
        with _borrow(fd) as memfd, raising(_OPERATION, f"descriptor {fd}"):
            header = memfd.read(_HEADER.size, 0)
            if len(header) < _HEADER.size:
                raise _damage_error(f"{len(header)} bytes are shorter than a header")
            magic, version, *lengths, digest = _HEADER.unpack(header)
            if magic != _MAGIC:
                raise _damage_error("its first bytes are not a manifest's")
            if version != _VERSION:
                hint = f"It is of version {version}, and this pyluo knows version {_VERSION}"
                raise HandoffError(EPROTONOSUPPORT, _OPERATION, "", hint)
            count, pid, table_length, state_length = lengths
            _check_limit("descriptors", count, max_files, "max_files")
            _check_limit("bytes of state", state_length, max_state, "max_state")
            if table_length > count * (_ENTRY.size + _MAX_NAME):
                raise _damage_error(f"a table of {table_length} bytes for {count} descriptors")
            if memfd.size != _HEADER.size + table_length + state_length:
                raise _damage_error(f"{memfd.size} bytes are not what its header says")
            table = memfd.read(table_length, _HEADER.size)
            state = memfd.read(state_length, _HEADER.size + table_length)
            if _digest(lengths, table, state) != digest:
                raise _damage_error("its digest is not that of its contents")
            return cls(_unpack(table, count), state, pid)


@contextmanager
def _borrow(fd: int) -> Iterator[Memfd]:
    memfd = Memfd(fd)
    try:
        yield memfd
    finally:
        memfd.detach()


def _digest(lengths: Sequence[int], table: bytes, state: bytes) -> bytes:
    whole = hashlib.sha256(_HEADER.pack(_MAGIC, _VERSION, *lengths, b""))
    whole.update(table)
    whole.update(state)
    return whole.digest()


def _pack(entry: Entry) -> bytes:
    name = entry.name.encode()
    if not 0 < len(name) <= _MAX_NAME:
        raise ValueError(
            f"{entry.name!r}: the name of a descriptor is 1 to {_MAX_NAME} bytes of UTF-8"
        )
    fields = entry.number, entry.device, entry.inode, entry.kind
    return _ENTRY.pack(*fields, len(name)) + name


def _unpack(table: bytes, count: int) -> tuple[Entry, ...]:
    """Checks everything: who can write a digest can write nonsense, too."""
    entries: dict[str, Entry] = {}
    offset = 0
    for _ in range(count):
        if len(table) < offset + _ENTRY.size:
            raise _damage_error("its table is too short")
        number, device, inode, kind, length = _ENTRY.unpack_from(table, offset)
        offset += _ENTRY.size
        raw = table[offset : offset + length]
        offset += length
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise _damage_error(f"{raw!r} is no UTF-8") from None
        if len(raw) < length or not 0 < length <= _MAX_NAME:
            raise _damage_error(f"a name of {length} bytes")
        if name in entries:
            raise _damage_error(f"two descriptors are called {name!r}")
        entries[name] = Entry(name, number, device, inode, kind)
    if offset != len(table):
        raise _damage_error("its table is too long")
    return tuple(entries.values())


def _check_limit(what: str, count: int, most: int | None, parameter: str) -> None:
    if most is not None and count > most:
        hint = f"{count} {what}, and the receiver takes {most}: see {parameter}"
        raise HandoffError(E2BIG, _OPERATION, "", hint)


def _damage_error(how: str) -> HandoffError:
    return HandoffError(EBADMSG, _OPERATION, "", f"This is not a manifest as written: {how}")
