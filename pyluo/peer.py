"""Packets with descriptors over Unix sockets, and the credentials of the process that sent them."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_FDS", "Packet", "Peer", "peer_credentials", "same_user", "send_packet"]

MAX_FDS = 253  # in one packet: SCM_MAX_FD in include/net/scm.h
_UCRED = struct.Struct("3i")
_SCM_PIDFD = 4  # include/linux/socket.h; Python's socket module does not have it yet
# In bytes. The owner of the socket may have enabled other ancillary data, such as security labels
# and time stamps. If the buffer had no room for these, the kernel would drop the descriptors, which
# come last.
_OTHER_ANCILLARY = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """The credentials of a process, which the kernel has checked.

    The numbers are valid in the namespaces of the caller.

    Attributes:
        pid: the PID; 0 if the process is outside the caller's PID namespace.
        uid: the effective user ID; 65534 if the user is not in the caller's user namespace.
        gid: the effective group ID; 65534 if the group is not in the caller's user namespace.
    """

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


def peer_credentials(connection: socket.socket) -> Peer:
    """Return the credentials of the process that created the other end of a connection.

    This is the process that called connect(), listen() or socketpair(). Another process may have
    the other end by now.

    Raises:
        OSError: the socket is not connected (ENOTCONN).

    Source: unix(7), SO_PEERCRED
    """
    connection.getpeername()
    return _peer(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))


def same_user(peer: Peer) -> bool:
    """Return whether a process belongs to the caller's effective user, or to root."""
    return peer.uid in (0, os.geteuid())


def send_packet(
    connection: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0
) -> None:
    """Send bytes, at most `MAX_FDS` descriptors, and the caller's effective credentials.

    Raises:
        OSError: sendmsg(2) failed, for example because too many descriptors of this user are in
            flight (ETOOMANYREFS); or the socket's timeout has passed (TimeoutError).

    Source: unix(7), SCM_RIGHTS and SCM_CREDENTIALS
    """
    # Without these explicit credentials, the kernel would send the real user ID; and it would send
    # none at all if the receiver has not enabled SO_PASSCRED yet.
    credentials = _UCRED.pack(os.getpid(), os.geteuid(), os.getegid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
    if fds:
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
    connection.sendmsg([data], ancillary, flags | socket.MSG_NOSIGNAL)


@dataclass(slots=True)
class Packet:
    """A packet that recvmsg(2) has received.

    Attributes:
        data: the bytes; empty if the connection has ended.
        fds: the descriptors, with close-on-exec set; the caller owns them.
        sender: the process that sent the packet; None unless SO_PASSCRED is set on the socket.
        data_truncated: whether the packet had more bytes than were received (MSG_TRUNC).
        fds_truncated: whether the packet had more descriptors than were received (MSG_CTRUNC).
    """

    data: bytes
    fds: list[int]
    sender: Peer | None
    data_truncated: bool
    fds_truncated: bool

    @classmethod
    def receive(cls, connection: socket.socket, size: int) -> Self:
        """Receive the next packet, of at most `size` bytes.

        The buffer has room for as many descriptors as a packet can have. So missing descriptors
        mean that the kernel could not give them to this process.

        Raises:
            OSError: recvmsg(2) failed, or the socket's timeout has passed (TimeoutError).
        """
        room = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(4 * MAX_FDS) + _OTHER_ANCILLARY
        data, ancillary, flags, _ = connection.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        packet = cls(
            data, [], None, bool(flags & socket.MSG_TRUNC), bool(flags & socket.MSG_CTRUNC)
        )
        for level, kind, content in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                packet.fds += _integers(content)
            elif kind == socket.SCM_CREDENTIALS:
                packet.sender = _peer(content)
            elif kind == _SCM_PIDFD:  # the owner of the socket enabled pidfds; close them unused
                for fd in _integers(content):
                    os.close(fd)
        return packet

    def close(self) -> None:
        """Close the descriptors; closing them twice does nothing."""
        while self.fds:
            os.close(self.fds.pop())


def _peer(ucred: bytes) -> Peer:
    pid, uid, gid = _UCRED.unpack(ucred)
    return Peer(pid, uid, gid)


def _integers(content: bytes) -> tuple[int, ...]:
    count = len(content) // 4
    return struct.unpack(f"{count}i", content[: 4 * count])
