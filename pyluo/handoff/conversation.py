"""The conversation of a handoff through a socket.

Each packet is answered before the next one goes, so that few descriptors are on their way at once,
and each side hears why the other one stopped::

    receiver  READY      here is somebody to conversation to
    sender    OFFER n    with the manifest; n descriptors will follow
    receiver  WANT i     has i of them; asks for the next 253, or what is left
    sender    FILES i    with these
    receiver  COMPLETE n has everything, and does nothing with it yet
    sender    COMMIT n   lets go
    either    REFUSED    in place of any of these: an errno, and why; it ends the conversation

A packet is a magic, the version, its kind and its number (n, i, or the errno), little-endian; after
REFUSED comes text in UTF-8.
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
    """What a packet says."""

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
    """A conversation; an error in it is told to the other side, and ends the connection.

    So nobody waits for more, and what is still on its way is not taken for the beginning of
    another conversation.
    """
    conversation = Conversation(connection, operation, allow)
    with raising(operation, conversation.subject):
        asked = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    waited = connection.gettimeout()
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
        with suppress(OSError):  # of a socket closed meanwhile; what was committed stays so
            connection.settimeout(waited)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, asked)


class Conversation:
    """One side of a conversation: says and hears packets, and believes only what it expects."""

    def __init__(self, connection: socket.socket, operation: str, allow: Allow) -> None:
        self._connection = connection
        self._operation = operation
        self._allow = allow
        self._peer: Peer | None = None

    @property
    def subject(self) -> str:
        """The other side, in words."""
        return str(self._peer or "the other end of the socket")

    @property
    def peer(self) -> Peer:
        """The process at the other end, once it has said something."""
        assert self._peer is not None
        return self._peer

    def check_creator(self) -> None:
        """Sees to it that whoever made the other end is allowed.

        Raises:
            HandoffError: EPERM, it is not; ENOTCONN, there is no other end.
        """
        with raising(self._operation, self.subject):
            peer = peer_credentials(self._connection)
        # Of a socketpair() it is this process itself, which says nothing of who has the end now.
        if peer.pid != os.getpid():
            self._check_allowed(peer, "made the other end of the socket")

    def send(self, kind: Kind, number: int = 0, fds: Sequence[int] = ()) -> None:
        """Sends a packet.

        Raises:
            HandoffError: as `send` says; what the other side gave as its reason, if it did.
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
        """The number of the next packet, and its descriptors.

        Args:
            kind: that it has to be of.
            number: that it has to have; None for any.
            fds: how many descriptors it has to bring.

        Raises:
            HandoffError: as `receive` says; what it brought is closed.
        """
        told, told_number, packet = self._next_packet()
        try:
            if told != kind or number not in (None, told_number):
                expected = kind.name if number is None else f"{kind.name} {number}"
                raise self.protocol_error(f"{told.name} {told_number} in place of {expected}")
            if len(packet.fds) != fds:
                raise self.protocol_error(
                    f"{len(packet.fds)} descriptors with {kind.name}, not {fds}"
                )
        except BaseException:
            packet.close()
            raise
        return told_number, [OwnedFd(fd) for fd in packet.fds]

    def expect_commit(self, number: int) -> None:
        """Waits for the sender's last word.

        After the shutdown it cannot come any more, so that the sender fails too; what came before
        can still be heard. Without it, the sender could let go in the moment in which this side
        gives up.
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
        """Tells the other side why, if it still listens."""
        if isinstance(error, LuoError):
            number, reason = error.errno or EIO, error.hint or error.strerror or ""
        else:
            number, reason = ECANCELED, f"{type(error).__name__}: {error}"
        text = reason.encode(errors="replace")[:_MAX_REASON]
        with suppress(OSError):
            head = _HEAD.pack(_MAGIC, _VERSION, Kind.REFUSED, number)
            send_packet(self._connection, head + text, flags=socket.MSG_DONTWAIT)

    def protocol_error(self, how: str) -> HandoffError:
        """What to raise at something that nobody says in a handoff."""
        hint = f"This is not how a handoff goes: {how}"
        return HandoffError(EBADMSG, self._operation, self.subject, hint)

    def _next_packet(self) -> tuple[Kind, int, Packet]:
        """The next packet of the same process, whole and not a refusal; its kind and number."""
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
                raise self.protocol_error("a packet longer than any")
            kind, number = self._parse(packet.data)
            if kind == Kind.REFUSED:
                raise self._refusal_error(number, packet.data[_HEAD.size :])
            if len(packet.data) != _HEAD.size:
                raise self.protocol_error(f"{len(packet.data)} bytes of {kind.name}")
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
                # Told once, if the other side hung up on something unheard; its reason comes next.
                return Packet.receive(self._connection, size)

    def _parse(self, data: bytes) -> tuple[Kind, int]:
        if len(data) < _HEAD.size:
            raise self.protocol_error(f"a packet of {len(data)} bytes")
        magic, version, kind, number = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise self.protocol_error(f"a packet that begins with {magic!r}")
        if version != _VERSION:
            hint = f"It speaks version {version}, and this pyluo version {_VERSION}"
            raise HandoffError(EPROTONOSUPPORT, self._operation, self.subject, hint)
        try:
            return Kind(kind), number
        except ValueError:
            raise self.protocol_error(f"a packet of kind {kind}") from None

    def _check_sender(self, sender: Peer | None) -> None:
        if sender is None:
            raise self.protocol_error("a packet without credentials")
        if self._peer is None:
            self._check_allowed(sender, "speaks")
            self._peer = sender
        elif sender != self._peer:
            raise self.protocol_error(f"{sender} speaks in its place")

    def _check_allowed(self, peer: Peer, role: str) -> None:
        if not self._allow(peer):
            hint = f"It is {peer} that {role}, and that is not allowed"
            raise HandoffError(EPERM, self._operation, self.subject, hint)

    def _refusal_error(self, number: int, text: bytes) -> HandoffError:
        shown = "".join(
            each if each.isprintable() else "?" for each in text.decode(errors="replace")
        )
        known = number if number in errorcode else EPROTO
        hint = f"The other process gave up: {shown}"
        return HandoffError(known, self._operation, self.subject, hint)

    def _lost_descriptors_error(self) -> HandoffError:
        """Why the kernel dropped descriptors: it does not tell, but answers a dup() alike."""
        try:
            os.close(os.dup(self._connection.fileno()))
        except OSError as error:
            hint = "The descriptors do not fit: see RLIMIT_NOFILE (ulimit -n), or fs.file-max"
            return HandoffError(error.errno or EIO, self._operation, self.subject, hint)
        hint = "The kernel let a descriptor not pass: see the rules of its security modules"
        return HandoffError(EACCES, self._operation, self.subject, hint)
