"""The protocol of a handoff through a socket.

Each side waits for the answer to a packet before it sends the next one. Therefore at most 253
descriptors are in flight at a time, and each side learns why the other side stopped::

    receiver  READY      the receiver has begun to receive
    sender    OFFER n    carries the descriptor of the manifest (names and state); n is the
                         number of descriptors to follow
    receiver  WANT i     the receiver has i descriptors, and asks for the next 253, or the rest
    sender    FILES i    contains these descriptors
    receiver  COMPLETE n the receiver has all n descriptors, but does not use them yet
    sender    COMMIT n   the sender has given the files up; the receiver may use them
    either    REFUSED    instead of any other packet: an errno and a reason; ends the conversation

WANT and FILES are repeated until the receiver has all descriptors. A packet consists of a magic,
the version, its kind and its number (n, i, or the errno), in little endian; REFUSED also contains
the reason as text in UTF-8.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from contextlib import contextmanager, suppress
from errno import (
    EACCES,
    EBADMSG,
    ECANCELED,
    ECONNRESET,
    EIO,
    EPERM,
    EPROTO,
    EPROTONOSUPPORT,
    ETIMEDOUT,
    errorcode,
)
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd
from pyluo.errors import HandoffError, LuoError
from pyluo.peer import Packet, Peer, peer_credentials, send_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Allow = Callable[[Peer], bool]

__all__ = ["Conversation", "Kind", "open_conversation"]

_MAGIC = b"pyluoHOP"
_VERSION = 1
_HEAD = struct.Struct("<8sHHI")
_MAX_REASON = 1000  # bytes


class Kind(enum.IntEnum):
    """The kind of a packet."""

    READY = 1
    OFFER = 2
    WANT = 3
    FILES = 4
    COMPLETE = 5
    COMMIT = 6
    REFUSED = 7


@contextmanager
def open_conversation(
    connection: socket.socket, operation: str, allow: Allow, timeout: float | None
) -> Iterator[Conversation]:
    """Yield a conversation over a connection.

    If an exception leaves the ``with`` block, the other side is told the reason and the connection
    is shut down. So the other side does not wait for more packets, and packets in flight are not
    taken for the beginning of another conversation.
    """
    conversation = Conversation(connection, operation, allow)
    with raising(operation, conversation.subject):
        passcred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    old_timeout = connection.gettimeout()
    connection.settimeout(timeout)
    try:
        conversation.check_creator()
        yield conversation
    except BaseException as error:
        conversation.send_refusal(error)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        raise
    finally:
        # The caller may have closed the socket; that must not turn a committed handoff into an
        # error.
        with suppress(OSError):
            connection.settimeout(old_timeout)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)


class Conversation:
    """One side of a handoff: sends packets, and receives packets of the expected kinds only."""

    def __init__(self, connection: socket.socket, operation: str, allow: Allow) -> None:
        self._connection = connection
        self._operation = operation
        self._allow = allow
        self._peer: Peer | None = None

    @property
    def subject(self) -> str:
        """A phrase that names the other side, for error messages."""
        return str(self._peer or "the other end of the socket")

    @property
    def peer(self) -> Peer:
        """The process at the other end; known only after it has sent a packet."""
        assert self._peer is not None
        return self._peer

    def check_creator(self) -> None:
        """Check that the process that created the other end of the socket may take part.

        Raises:
            HandoffError: the process may not take part (EPERM), or the socket is not connected
                (ENOTCONN).
        """
        with raising(self._operation, self.subject):
            peer = peer_credentials(self._connection)
        # If the socket is from socketpair(), this process itself created the other end. That says
        # nothing about the process that has the other end now.
        if peer.pid != os.getpid():
            self._check_allowed(peer, "made the other end of the socket")

    def send(self, kind: Kind, number: int = 0, fds: Sequence[int] = ()) -> None:
        """Send a packet.

        Raises:
            HandoffError: see `pyluo.handoff.send`; it contains the other side's reason, if that
                side has sent one.
        """
        with raising(self._operation, self.subject):
            try:
                send_packet(self._connection, _HEAD.pack(_MAGIC, _VERSION, kind, number), fds)
            except (BrokenPipeError, ConnectionResetError):
                self._next_packet()[2].close()
                raise

    def expect(
        self, kind: Kind, number: int | None = None, *, fds: int = 0
    ) -> tuple[int, list[OwnedFd]]:
        """Receive the next packet, and return its number and its descriptors.

        Args:
            kind: the kind that the packet must have.
            number: the number that the packet must have; None if any number is accepted.
            fds: how many descriptors the packet must contain.

        Raises:
            HandoffError: see `pyluo.handoff.receive`. The packet's descriptors are closed then.
        """
        actual_kind, actual_number, packet = self._next_packet()
        try:
            if actual_kind != kind or number not in (None, actual_number):
                actual = f"{actual_kind.name} {actual_number}"
                expected = kind.name if number is None else f"{kind.name} {number}"
                raise self.protocol_error(f"{actual} instead of {expected}")
            if len(packet.fds) != fds:
                raise self.protocol_error(
                    f"{len(packet.fds)} descriptors with {kind.name}, not {fds}"
                )
        except BaseException:
            packet.close()
            raise
        return actual_number, [OwnedFd(fd) for fd in packet.fds]

    def expect_commit(self, number: int) -> None:
        """Wait for the sender's COMMIT.

        After a timeout, this side shuts the socket down for receiving. From then on the sender
        cannot send COMMIT: it gets an error instead. A COMMIT that was sent before the shutdown is
        still received. Without the shutdown, the sender could commit just when this side gives up.

        Raises:
            HandoffError: COMMIT did not arrive in time, and was not sent before the shutdown either
                (ETIMEDOUT); see also `expect`.
        """
        try:
            self.expect(Kind.COMMIT, number)
        except HandoffError as error:
            if error.errno != ETIMEDOUT:
                raise
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RD)
            try:
                self.expect(Kind.COMMIT, number)
            except HandoffError:
                raise error from None

    def send_refusal(self, error: BaseException) -> None:
        """Send the reason of an error to the other side, if the other side is still connected."""
        if isinstance(error, LuoError):
            number, reason = error.errno or EIO, error.hint or error.strerror or ""
        else:
            number, reason = ECANCELED, f"{type(error).__name__}: {error}"
        text = reason.encode(errors="replace")[:_MAX_REASON]
        with suppress(OSError):
            head = _HEAD.pack(_MAGIC, _VERSION, Kind.REFUSED, number)
            send_packet(self._connection, head + text, flags=socket.MSG_DONTWAIT)

    def protocol_error(self, problem: str) -> HandoffError:
        """Return the exception for a packet that violates the protocol."""
        hint = f"The other side broke the protocol: {problem}"
        return HandoffError(EBADMSG, self._operation, self.subject, hint)

    def _next_packet(self) -> tuple[Kind, int, Packet]:
        """Receive the next packet; return its kind, its number, and the packet.

        Raises:
            HandoffError: the packet is REFUSED (the errno in it; EPROTO if that is unknown); the
                packet is too long, has no credentials or is not valid, or a process other than the
                previous sender sent it (EBADMSG); it uses another version of the protocol
                (EPROTONOSUPPORT); its sender may not take part (EPERM); the kernel dropped
                descriptors from it (see `_lost_descriptors_error`); no packet came in time
                (ETIMEDOUT); the other process has hung up (ECONNRESET); see also
                `pyluo.handoff.receive`.
        """
        packet = self._receive()
        try:
            if not packet.data:
                raise HandoffError(
                    ECONNRESET, self._operation, self.subject, "The other process has hung up"
                )
            if packet.fds_truncated:
                raise self._lost_descriptors_error()
            self._check_sender(packet.sender)
            if packet.data_truncated:
                raise self.protocol_error("a packet is longer than any of the protocol")
            kind, number = self._parse(packet.data)
            if kind == Kind.REFUSED:
                raise self._refusal_error(number, packet.data[_HEAD.size :])
            if len(packet.data) != _HEAD.size:
                raise self.protocol_error(f"{kind.name} has {len(packet.data)} bytes")
        except BaseException:
            packet.close()
            raise
        return kind, number, packet

    def _receive(self) -> Packet:
        size = _HEAD.size + _MAX_REASON
        with raising(self._operation, self.subject):
            try:
                return Packet.receive(self._connection, size)
            except ConnectionResetError:
                # The other side closed the socket before it had read all packets. The kernel
                # reports this once; receiving again returns the reason that the other side sent.
                return Packet.receive(self._connection, size)

    def _parse(self, data: bytes) -> tuple[Kind, int]:
        if len(data) < _HEAD.size:
            raise self.protocol_error(f"a packet has {len(data)} bytes")
        magic, version, kind, number = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise self.protocol_error(f"a packet begins with {magic!r}")
        if version != _VERSION:
            hint = f"It uses version {version} of the protocol, and this pyluo version {_VERSION}"
            raise HandoffError(EPROTONOSUPPORT, self._operation, self.subject, hint)
        try:
            return Kind(kind), number
        except ValueError:
            raise self.protocol_error(f"a packet is of the unknown kind {kind}") from None

    def _check_sender(self, sender: Peer | None) -> None:
        if sender is None:
            raise self.protocol_error("a packet has no credentials")
        if self._peer is None:
            self._check_allowed(sender, "sends packets there")
            self._peer = sender
        elif sender != self._peer:
            raise self.protocol_error(f"{sender} sends packets in its place")

    def _check_allowed(self, peer: Peer, role: str) -> None:
        if not self._allow(peer):
            hint = f"{peer} {role}, and it is not allowed to take part"
            raise HandoffError(EPERM, self._operation, self.subject, hint)

    def _refusal_error(self, number: int, text: bytes) -> HandoffError:
        reason = "".join(
            each if each.isprintable() else "?" for each in text.decode(errors="replace")
        )
        known = number if number in errorcode else EPROTO
        hint = f"The other process gave up: {reason}"
        return HandoffError(known, self._operation, self.subject, hint)

    def _lost_descriptors_error(self) -> HandoffError:
        """Return the exception for descriptors that the kernel dropped from a packet.

        The kernel does not report the reason, so this method calls dup(). If that fails, a
        descriptor limit was the reason, and the exception gets that errno; otherwise this method
        assumes that a security module was the reason (EACCES).
        """
        try:
            os.close(os.dup(self._connection.fileno()))
        except OSError as error:
            hint = "The descriptors do not fit: see RLIMIT_NOFILE (ulimit -n), or fs.file-max"
            return HandoffError(error.errno or EIO, self._operation, self.subject, hint)
        hint = "A security module of the kernel blocked a descriptor: see its rules"
        return HandoffError(EACCES, self._operation, self.subject, hint)
