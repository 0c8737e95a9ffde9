"""`StateFormat`: files that have the whole state of a VM, or of its devices, or none."""

from __future__ import annotations

import errno
import struct
import zlib
from typing import TYPE_CHECKING

from pyluo.operation import Operation

if TYPE_CHECKING:
    from pyluo.errors import RequestError
    from pyluo.memfd import Memfd

__all__ = ["StateFormat"]

# What a state begins with: the format's name, its version, the CRC and the length of what follows.
_HEAD = struct.Struct("=8sIIQ")
_READ = Operation("read a state")


class StateFormat:
    """A format of states that a VMM writes into files, which a store then carries over.

    A file that is written at the last moment before a jump is preserved long before, empty: then
    writing it needs no memory and no request to the kernel. What is half written, damaged, or of
    another format or version is told apart from a state before anything is made of it.

    Args:
        name: eight ASCII characters, which no other format has.
        version: the version of what the states consist of.
    """

    def __init__(self, name: str, version: int) -> None:
        self._name = name
        self._magic = name.encode("ascii")
        if len(self._magic) != 8:
            raise ValueError(f"the name of a format has eight characters, not {len(self._magic)}")
        self._version = version

    def pack(self, state: bytes) -> bytes:
        """Return a state with the head by which `unpack` recognizes it."""
        checksum = zlib.crc32(state)
        return _HEAD.pack(self._magic, self._version, checksum, len(state)) + state

    def unpack(self, data: bytes) -> bytes:
        """Return the state that `pack` was given; bytes after its end are ignored.

        Raises:
            RequestError: there is no state of this format, or not all of it, or it is damaged
                (EBADMSG); it is of another version (EPROTONOSUPPORT).
        """
        if len(data) < _HEAD.size:
            raise self.error(errno.EBADMSG, f"It has {len(data)} bytes only")
        magic, version, checksum, length = _HEAD.unpack_from(data)
        if magic != self._magic:
            raise self.error(errno.EBADMSG, "Nothing, or not all of it, was written there")
        if version != self._version:
            hint = f"It is of version {version}; this program reads version {self._version}"
            raise self.error(errno.EPROTONOSUPPORT, hint)
        state = data[_HEAD.size : _HEAD.size + length]
        if len(state) != length or zlib.crc32(state) != checksum:
            raise self.error(errno.EBADMSG, "Its checksum is wrong")
        return state

    def room(self, memfd: Memfd) -> int:
        """Return how many bytes of state fit into a file."""
        return max(memfd.size - _HEAD.size, 0)

    def write(self, memfd: Memfd, state: bytes) -> None:
        """Write a state into a file, in an order in which no part can be taken for all of it.

        The size of the file does not change, as that of a preserved file cannot.

        Raises:
            ValueError: the file is too small; it is as it was.
        """
        data = self.pack(state)
        if len(data) > memfd.size:
            raise ValueError(f"a state of {len(data)} bytes in a file of {memfd.size} bytes")
        self.erase(memfd)
        memfd.write(data[_HEAD.size :], _HEAD.size)
        memfd.write(data[: _HEAD.size], 0)

    def erase(self, memfd: Memfd) -> None:
        """Make a file one that has no state."""
        memfd.write(bytes(min(_HEAD.size, memfd.size)), 0)

    def read(self, memfd: Memfd) -> bytes:
        """Return the state in a file.

        Raises:
            RequestError: as `unpack`.
        """
        return self.unpack(memfd.read(memfd.size, 0))

    def error(self, number: int, hint: str) -> RequestError:
        """Return the exception for a state that cannot be used.

        Args:
            number: the errno, EBADMSG or EPROTONOSUPPORT.
            hint: what is wrong with it.
        """
        return _READ.error(number, f"a state of format {self._name}", hint)
