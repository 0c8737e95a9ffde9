"""Packets over Unix sockets that carry descriptors, and the credentials of the peer."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_FDS", "Packet", "Peer", "peer_credentials", "same_user", "send_packet"]

MAX_FDS = 253  # in a packet: SCM_MAX_FD of include/net/scm.h
_UCRED = struct.Struct("3i")
_SCM_PIDFD = 4  # include/linux/socket.h; Python's socket module does not have it yet
# Room for security labels, time stamps and whatever else the owner of the socket may have enabled.
# Without it the kernel would drop descriptors, which come last.
_OTHER_ANCILLARY = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """The credentials of a process, guaranteed by the kernel and as the caller's namespaces see it.

    Attributes:
        pid: the process; 0 if it is outside the caller's PID namespace.
        uid: its effective user; 65534 if the user is not in the caller's user namespace.
        gid: its effective group; 65534 if the group is not in the caller's user namespace.
    """

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


def peer_credentials(connection: socket.socket) -> Peer:
    """Return the process that created the other end with connect(), listen() or socketpair().

    Another process may have the other end by now.

    Raises:
        OSError: the socket is not connected (ENOTCONN).

    Source: unix(7), SO_PEERCRED
    """
    connection.getpeername()
    return _peer(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))


def same_user(peer: Peer) -> bool:
    """Return whether a process is of the caller's effective user, or of root."""
    return peer.uid in (0, os.geteuid())


def send_packet(
    connection: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0
) -> None:
    """Send bytes, at most `MAX_FDS` descriptors, and the caller's effective credentials.

    Raises:
        OSError: as sendmsg(2) does, among others because too many descriptors of this user are in
            flight (ETOOMANYREFS); TimeoutError.

    Source: unix(7), SCM_RIGHTS and SCM_CREDENTIALS
    """
    # By default the kernel sends the real user, or nothing as long as the receiver has not enabled
    # SO_PASSCRED.
    own = _UCRED.pack(os.getpid(), os.geteuid(), os.getegid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own)]
    if fds:
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
    connection.sendmsg([data], ancillary, flags | socket.MSG_NOSIGNAL)


@dataclass(slots=True)
class Packet:
    """The result of a recvmsg(2).

    Attributes:
        data: the bytes; empty at the end of the connection.
        fds: the descriptors, with close-on-exec set; the caller owns them.
        sender: the process that sent the packet, if the socket has SO_PASSCRED.
        data_truncated: whether the packet had more bytes (MSG_TRUNC).
        fds_truncated: whether the packet had more descriptors, which this process could not get
            (MSG_CTRUNC).
    """

    data: bytes
    fds: list[int]
    sender: Peer | None
    data_truncated: bool
    fds_truncated: bool

    @classmethod
    def receive(cls, connection: socket.socket, size: int) -> Self:
        """Receive the next packet, of at most `size` bytes.

        The buffer has room for all the descriptors that a packet can carry, so if some are missing,
        the process could not get them.

        Raises:
            OSError: as recvmsg(2) does; TimeoutError.
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
            elif kind == _SCM_PIDFD:  # the owner of the socket enabled them, but nobody uses them
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
