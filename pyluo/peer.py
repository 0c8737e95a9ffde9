"""Packets with descriptors from Unix sockets, and the process that sent them."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

from pyluo._sys import PacketBuffer
from pyluo.descriptor import OwnedFd, ReceivedFd

__all__ = ["Packet", "Peer", "peer_credentials", "same_user"]

_UCRED = struct.Struct("3i")
_ALL_USERS = (1 << 32) - 1  # the number of user IDs; the highest number is not one


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
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(ucred))


def same_user(peer: Peer) -> bool:
    """Return whether a process is known to belong to the caller's effective user, or to root.

    In a user namespace, all users that are not mapped into it appear as the same user, 65534. This
    number then tells nobody apart, even if the caller has it as well, and the result is False.

    Source: user_namespaces(7), Unmapped user and group IDs
    """
    if peer.uid not in (0, os.geteuid()):
        return False
    return peer.uid != _overflow_user() or _every_user_is_mapped()


def _overflow_user() -> int:
    """Return the ID that stands for each user who is not mapped into this user namespace."""
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            return int(file.read())
    except OSError:
        return 65534


def _every_user_is_mapped() -> bool:
    """Return whether this user namespace has all users, as the initial one does."""
    try:
        with open("/proc/self/uid_map") as file:
            return sum(int(line.split()[2]) for line in file) >= _ALL_USERS
    except OSError:  # the kernel has no user namespaces, or there is no /proc, which says nothing
        return os.path.exists("/proc/self")


class Packet:
    """A packet from a socket, or the end of the connection, once one has come.

    The descriptors in `files` belong to this object until somebody else closes or keeps them.
    """

    __slots__ = ("_buffer", "_files")

    def __init__(self) -> None:
        self._buffer = PacketBuffer()
        self._files: list[ReceivedFd] = []

    def receive(self, fd: int) -> int:
        """Receive a packet without waiting, unless this object has one already.

        Returns:
            The number of bytes, 0 at the end of the connection; a negative errno if none came.
        """
        return self._buffer.receive(fd)

    @property
    def data(self) -> bytes:
        """The bytes of the packet."""
        return self._buffer.data

    @property
    def data_truncated(self) -> bool:
        """Whether the packet had more bytes than were received."""
        return bool(self._buffer.flags & socket.MSG_TRUNC)

    @property
    def fds_truncated(self) -> bool:
        """Whether the packet had more descriptors than were received.

        The buffer has room for as many as a packet can have. So missing descriptors mean that the
        kernel could not give them to this process.
        """
        return bool(self._buffer.flags & socket.MSG_CTRUNC)

    @property
    def sender(self) -> Peer | None:
        """The process that sent the packet; None unless SO_PASSCRED is set on the socket."""
        credentials = self._buffer.credentials
        return None if credentials is None else Peer(*credentials)

    @property
    def files(self) -> list[ReceivedFd]:
        """The descriptors, with close-on-exec set.

        An interrupted call leaves none of them behind: the next one goes on.
        """
        while len(self._files) < self._buffer.fd_count:
            self._files.append(ReceivedFd(-1))
        for index, file in enumerate(self._files):
            self._buffer.move_fd(index, file.fd_number)
        return self._files

    @property
    def has_pidfd(self) -> bool:
        """Whether there is a pidfd of the sender.

        There is one if SO_PASSPIDFD is set on the socket, and the kernel could open it.
        """
        return self._buffer.pidfd >= 0

    def move_pidfd(self, to: OwnedFd) -> None:
        """Move the pidfd of the sender to an object without a descriptor."""
        self._buffer.move_pidfd(to.fd_number)

    def close_pidfd(self) -> None:
        """Close the pidfd, if it is still here."""
        self._buffer.close_pidfd()

    def close(self) -> None:
        """Close the descriptors that are still here; closing them twice does nothing."""
        for file in self.files:
            file.close()
        self.close_pidfd()
