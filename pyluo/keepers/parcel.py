"""Parcels: any number of descriptors, in flight behind a single one.

A parcel is a Unix socket whose queue holds descriptors that were sent with SCM_RIGHTS. They take no
room in the descriptor table of any process, and stay open as long as the socket does.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from pyluo.descriptor import OwnedFd
from pyluo.errors import KeeperError, RequestError
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Parcel"]

_PER_PACKET = 253  # SCM_MAX_FD in include/net/scm.h
_PEEK_OFFSET = 42  # SO_PEEK_OFF in include/uapi/asm-generic/socket.h, which Python does not name
_SEND_BUFFER_FORCE = 32  # SO_SNDBUFFORCE, likewise
_PACKET_COST = 1 << 13  # bytes of the queue that a packet takes, at most
_COUNT = struct.Struct("<I")
_PACK = Operation("pack descriptors", KeeperError)
_UNPACK = Operation(
    "unpack descriptors",
    KeeperError,
    {errno.EMFILE: "Raise RLIMIT_NOFILE", errno.EBADMSG: "It is no parcel"},
)


class Parcel(OwnedFd):
    """Descriptors in flight, each with a token.

    They are sent in packets. A packet has the number of its descriptors in 4 bytes and the token of
    each of them in 8 bytes, little-endian.
    """

    __slots__ = ()

    @classmethod
    def pack(cls, files: Iterable[tuple[int, OwnedFd]], count: int) -> Parcel:
        """Return a parcel of descriptors; close each of them once it is in flight.

        No more than 253 of the descriptors are taken from `files` before they are closed.

        Args:
            files: pairs of a token and a descriptor.
            count: how many files there are.

        Raises:
            KeeperError: more descriptors are in flight than RLIMIT_NOFILE allows, and the caller
                has neither CAP_SYS_RESOURCE nor CAP_SYS_ADMIN (ETOOMANYREFS); or the queue is full
                (ENOBUFS).
        """
        sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with sender, receiver:
            sender.setblocking(False)
            _make_room(sender, count)
            part: list[tuple[int, OwnedFd]] = []
            try:
                for each in files:
                    part.append(each)
                    if len(part) == _PER_PACKET:
                        _send(sender, part)
                if part:
                    _send(sender, part)
            finally:
                for _, file in part:
                    file.close()
            return cls(receiver.detach())

    def unpack(self) -> Iterator[dict[int, OwnedFd]]:
        """Yield new descriptors of the files by their tokens, up to 253 at a time.

        The parcel stays as it is. What the caller leaves in a dictionary is closed before the next
        one.

        Raises:
            KeeperError: this is no parcel (EBADMSG); too many files are open (EMFILE).
        """
        with _UNPACK.raising(f"descriptor {self.fileno()}"):
            receiver = socket.socket(fileno=os.dup(self.fileno()))
        with receiver, _UNPACK.raising(f"descriptor {self.fileno()}"):
            receiver.setsockopt(socket.SOL_SOCKET, _PEEK_OFFSET, 0)
            yield from _peek_all(receiver)


def _make_room(sender: socket.socket, count: int) -> None:
    """Make the queue long enough for a number of descriptors."""
    size = (1 + count // _PER_PACKET) * _PACKET_COST
    try:
        sender.setsockopt(socket.SOL_SOCKET, _SEND_BUFFER_FORCE, size)
    except PermissionError:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def _send(sender: socket.socket, files: list[tuple[int, OwnedFd]]) -> None:
    """Send a packet with these files; close them and empty the list."""
    tokens = b"".join(token.to_bytes(8, "little") for token, _ in files)
    packet = _COUNT.pack(len(files)) + tokens
    try:
        with _PACK.raising(f"{len(files)} descriptors"):
            sent = socket.send_fds(sender, [packet], [file.fileno() for _, file in files])
    except RequestError as error:
        if error.errno == errno.EAGAIN:
            hint = "The queue is full: raise the sysctl net.core.wmem_max"
            raise _PACK.error(errno.ENOBUFS, error.subject, hint) from None
        if error.errno == errno.ETOOMANYREFS:
            error.hint = "Raise RLIMIT_NOFILE above the number of files in flight"
        raise
    assert sent == len(packet), "a packet fits into a single buffer of the kernel"
    while files:
        files.pop()[1].close()


def _peek_all(receiver: socket.socket) -> Iterator[dict[int, OwnedFd]]:
    ancillary = socket.CMSG_SPACE(_PER_PACKET * array.array("i").itemsize)
    flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    while True:
        packet, messages, status, _ = receiver.recvmsg(1 << 12, ancillary, flags)
        if not packet:
            return
        numbers = array.array("i")
        for _, _, data in messages:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        files = [OwnedFd(number) for number in numbers]
        unpacked: dict[int, OwnedFd] = {}
        try:
            if status & socket.MSG_CTRUNC:  # the kernel could not open all of them
                raise KeeperError(errno.EMFILE, "unpack descriptors", hint="Raise RLIMIT_NOFILE")
            tokens = [
                int.from_bytes(packet[at : at + 8], "little")
                for at in range(_COUNT.size, len(packet), 8)
            ]
            if (
                not files
                or len(tokens) != len(files)
                or packet[: _COUNT.size] != _COUNT.pack(len(files))
            ):
                raise KeeperError(errno.EBADMSG, "unpack descriptors", hint="It is no parcel")
            unpacked = dict(zip(tokens, files, strict=True))
            files = []
            yield unpacked
        finally:
            for file in (*files, *unpacked.values()):
                file.close()
