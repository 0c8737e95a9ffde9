"""The manifest of a handoff: a sealed memfd with the names of the descriptors and the state.

Handoffs through a socket and through exec both use a manifest, because neither a packet nor the
environment has room for a state of many mebibytes. Because of the seals, nobody can change a
manifest after it was checked, even if another process has it open. The layout::

    bytes 0-7    magic
    bytes 8-11   version of the layout
    bytes 12-15  number of entries
    bytes 16-23  PID of the process that calls exec; 0 in a handoff through a socket
    bytes 24-31  length of the table, in bytes
    bytes 32-39  length of the state, in bytes
    bytes 40-71  SHA-256 of the whole manifest, calculated with zeros in this field
    table        for each entry: number of the descriptor (-1 in a handoff through a socket),
                 st_dev, st_ino, kind of file, length of the name, name in UTF-8
    state        the bytes that the caller passed

All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from errno import E2BIG, EBADMSG, EPROTONOSUPPORT
from typing import TYPE_CHECKING, Self

from pyluo.errors import HandoffError
from pyluo.memfd import Memfd, Seal, read_at, read_seals
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Entry", "Manifest"]

_MAGIC = b"pyluoHOM"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ32s")
_ENTRY = struct.Struct("<iQQIH")
_MAX_NAME = 255  # bytes
_SEALS = Seal.SEAL | Seal.SHRINK | Seal.GROW | Seal.WRITE
_READ = Operation("read handoff", HandoffError)


@dataclass(frozen=True, slots=True)
class Entry:
    """The name of a descriptor, and the identity of its file.

    Attributes:
        name: the name of the descriptor in the handoff.
        number: the number of the descriptor, which is the same after exec; -1 in a handoff through
            a socket.
        device: the st_dev of the file.
        inode: the st_ino of the file. Most files with an anonymous inode (eventfd, epoll, …) share
            one number, so it does not tell them apart.
        kind: the file type bits of st_mode; 0 for anonymous inodes.
    """

    name: str
    number: int
    device: int
    inode: int
    kind: int

    @classmethod
    def of(cls, name: str, fd: int, number: int = -1) -> Self:
        """Return the entry for an open descriptor.

        Raises:
            OSError: the descriptor is not open (EBADF).
        """
        status = os.fstat(fd)
        return cls(name, number, status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode))

    def matches(self, fd: int) -> bool:
        """Return whether a descriptor refers to this entry's file, as far as fstat(2) can tell.

        Raises:
            OSError: the descriptor is not open (EBADF).
        """
        return Entry.of(self.name, fd, self.number) == self


@dataclass(frozen=True, slots=True)
class Manifest:
    """The names of the descriptors that are handed over, and the state.

    Attributes:
        entries: one entry for each descriptor, in the order of the descriptors.
        state: the bytes that are handed over with the descriptors.
        pid: the PID of the process that calls exec; 0 in a handoff through a socket.
    """

    entries: tuple[Entry, ...]
    state: bytes
    pid: int = 0

    def to_memfd(self) -> Memfd:
        """Write the manifest into a new memfd and seal it.

        Raises:
            ValueError: a name is empty, or longer than 255 bytes in UTF-8.
            RequestError: see `Memfd.create` and `Memfd.write`.
        """
        table = b"".join(map(_pack, self.entries))
        lengths = len(self.entries), self.pid, len(table), len(self.state)
        digest = _digest(lengths, table, self.state)
        memfd = Memfd.create("pyluo-handoff", 0, executable=False)
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
        """Read and check a manifest from an untrusted descriptor, which the caller still owns.

        Args:
            fd: the descriptor.
            max_files: the largest number of entries to accept; None for no limit.
            max_state: the largest state to accept, in bytes; None for no limit.

        Raises:
            HandoffError: the file is not a manifest, or is damaged (EBADMSG); the manifest has
                another version (EPROTONOSUPPORT); it exceeds a limit (E2BIG); there is no memory
                (ENOMEM).
        """
        # Reading a file without these seals could block for ever, and it could change after the
        # check.
        if read_seals(fd) & _SEALS != _SEALS:
            raise _damage_error("it is not a sealed memfd")
        with _READ.raising(f"descriptor {fd}"):
            header = read_at(fd, _HEADER.size, 0)
            if len(header) < _HEADER.size:
                raise _damage_error(f"{len(header)} bytes are too short for a header")
            magic, version, *lengths, digest = _HEADER.unpack(header)
            if magic != _MAGIC:
                raise _damage_error("its first bytes are not a manifest's")
            if version != _VERSION:
                hint = f"It has version {version}, and this pyluo knows version {_VERSION}"
                raise HandoffError(EPROTONOSUPPORT, _READ.name, "", hint)
            count, pid, table_length, state_length = lengths
            _check_limit("descriptors", count, max_files, "max_files")
            _check_limit("bytes of state", state_length, max_state, "max_state")
            if table_length > count * (_ENTRY.size + _MAX_NAME):
                raise _damage_error(f"its table has {table_length} bytes for {count} descriptors")
            if os.fstat(fd).st_size != _HEADER.size + table_length + state_length:
                raise _damage_error("its size is not that of its header")
            table = read_at(fd, table_length, _HEADER.size)
            state = read_at(fd, state_length, _HEADER.size + table_length)
            if _digest(lengths, table, state) != digest:
                raise _damage_error("its digest is not that of its contents")
            return cls(_unpack(table, count), state, pid)


def _digest(lengths: Sequence[int], table: bytes, state: bytes) -> bytes:
    digest = hashlib.sha256(_HEADER.pack(_MAGIC, _VERSION, *lengths, b""))
    digest.update(table)
    digest.update(state)
    return digest.digest()


def _pack(entry: Entry) -> bytes:
    name = entry.name.encode()
    if not 0 < len(name) <= _MAX_NAME:
        raise ValueError(
            f"{entry.name!r}: the name of a descriptor is 1 to {_MAX_NAME} bytes of UTF-8"
        )
    fields = entry.number, entry.device, entry.inode, entry.kind
    return _ENTRY.pack(*fields, len(name)) + name


def _unpack(table: bytes, count: int) -> tuple[Entry, ...]:
    """Return the entries in a table; raise HandoffError if anything in it is invalid.

    Everything is checked, because a manifest with a valid digest can still be malicious.
    """
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
            raise _damage_error(f"{raw!r} is not UTF-8") from None
        if len(raw) < length or not 0 < length <= _MAX_NAME:
            raise _damage_error(f"it has a name of {length} bytes")
        if name in entries:
            raise _damage_error(f"two descriptors are called {name!r}")
        entries[name] = Entry(name, number, device, inode, kind)
    if offset != len(table):
        raise _damage_error("its table is too long")
    return tuple(entries.values())


def _check_limit(what: str, count: int, most: int | None, parameter: str) -> None:
    if most is not None and count > most:
        hint = f"It has {count} {what}, and the receiver accepts {most}: see {parameter}"
        raise HandoffError(E2BIG, _READ.name, "", hint)


def _damage_error(problem: str) -> HandoffError:
    return HandoffError(EBADMSG, _READ.name, "", f"This is not a valid manifest: {problem}")
