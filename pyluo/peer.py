"""Who is at the other end of a Unix socket, and packets from there that may bring descriptors."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_FDS", "Packet", "Peer", "peer_credentials", "same_user", "send_packet"]

MAX_FDS = 253  # SCM_MAX_FD of include/net/scm.h: in one packet
_UCRED = struct.Struct("3i")
_SCM_PIDFD = 4  # include/linux/socket.h; not in Python's socket yet
# Labels, time stamps and what else the owner of the socket may have switched on: without room for
# them the kernel would cut off descriptors, which come last.
_OTHER_ANCILLARY = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """A process as the kernel vouches for it, in terms of the caller's namespaces.

    Attributes:
        pid: of the process; 0 if it lies outside the caller's PID namespace.
        uid: its effective user; 65534 for one that the caller's user namespace does not know.
        gid: its effective group, likewise.
    """

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


def peer_credentials(connection: socket.socket) -> Peer:
    """Who made the other end: called connect() or listen(), or socketpair() for both.

    Whoever has the other end now may be another process.

    Raises:
        OSError: ENOTCONN, there is no other end.

    Source: unix(7), SO_PEERCRED
    """
    connection.getpeername()
    return _peer(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))


def same_user(peer: Peer) -> bool:
    """Whether it is root, or of the user as which the caller acts."""
    return peer.uid in (0, os.geteuid())


def send_packet(
    connection: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0
) -> None:
    """Sends bytes, at most `MAX_FDS` descriptors, and the caller's effective credentials.

    Raises:
        OSError: as sendmsg(2) does; ETOOMANYREFS, too many descriptors of this user are on their
            way; TimeoutError.

    Source: unix(7), SCM_RIGHTS and SCM_CREDENTIALS
    """
    # Left to itself the kernel tells the real user, or nothing while nobody has asked for it yet.
    own = _UCRED.pack(os.getpid(), os.geteuid(), os.getegid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own)]
    if fds:
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
    connection.sendmsg([data], ancillary, flags | socket.MSG_NOSIGNAL)


@dataclass(slots=True)
class Packet:
    """What one recvmsg(2) brought.

    Attributes:
        data: the bytes; none at the end of the connection.
        fds: descriptors, close-on-exec, which are the caller's now.
        sender: who sent it, if the socket has SO_PASSCRED.
        data_truncated: whether there were more bytes (MSG_TRUNC).
        fds_truncated: whether there were more descriptors than this process could get (MSG_CTRUNC).
    """

    data: bytes
    fds: list[int]
    sender: Peer | None
    data_truncated: bool
    fds_truncated: bool

    @classmethod
    def receive(cls, connection: socket.socket, size: int) -> Self:
        """The next packet, of at most `size` bytes.

        There is room for all the descriptors that a packet can bring, announced or not, so that
        those that are missing did not fit into this process.

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
            elif kind == _SCM_PIDFD:  # the owner of the socket asked for these: nobody uses them
                for fd in _integers(content):
                    os.close(fd)
        return packet

    def close(self) -> None:
        """Closes the descriptors; a second time does nothing."""
        while self.fds:
            os.close(self.fds.pop())


def _peer(ucred: bytes) -> Peer:
    pid, uid, gid = _UCRED.unpack(ucred)
    return Peer(pid, uid, gid)


def _integers(content: bytes) -> tuple[int, ...]:
    count = len(content) // 4
    return struct.unpack(f"{count}i", content[: 4 * count])
