"""What both sides of a handoff have in common: a state machine without sockets in it.

A machine gets the packets that were received, and says which packet to send next. It never waits
and makes no system call on a connection, so that any driver can use it::

    while not machine.done:
        if machine.pending is not None:
            ...  # send machine.pending, then call machine.sent(machine.pending)
        elif machine.awaits_death:
            ...  # wait until the other process is dead, then call machine.peer_died()
        else:
            ...  # receive a packet, then call machine.receive(packet)

A driver reports the end of the connection by `hung_up`, and calls `give_up` to end the handoff
early, for example when it has waited for too long. `pyluo.handoff.conversation` has two drivers.

Each transition is a single assignment. So an exception that a signal handler raises in one of
these methods leaves the machine before or after the transition, and the same call can be repeated.
"""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from errno import (
    EACCES,
    EBADMSG,
    ECANCELED,
    ECONNRESET,
    EIO,
    EPERM,
    EPROTO,
    EPROTONOSUPPORT,
    errorcode,
)
from typing import TYPE_CHECKING, Any

from pyluo.errors import HandoffError, RequestError
from pyluo.handoff.packets import HEAD, MAGIC, VERSION, Kind, Outgoing

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.operation import Operation
    from pyluo.peer import Packet, Peer

    Allow = Callable[[Peer], bool]

__all__ = ["Machine", "Owner", "Phase", "State"]


class Owner(enum.Enum):
    """Who may use the files that are handed over."""

    SENDER = "sender"
    RECEIVER = "receiver"
    UNDECIDED = "undecided"
    """This side does not know. It must not use the files until it knows that the other is dead."""


class Phase(enum.Enum):
    """How far a machine has come."""

    TALKING = enum.auto()
    BROKEN = enum.auto()  # the connection has ended, and it is undecided who owns the files
    CLAIMING = enum.auto()  # likewise, and this side waits for the death of the other
    GIVING_UP = enum.auto()  # the other side is to be told
    FAILED = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True)
class State:
    """The state of a machine.

    Attributes:
        phase: how far the machine has come.
        owner: who may use the files.
        pending: the packet to send next.
        expected: the kind, the number and the count of descriptors that the next packet must have.
        last: the packet that was received last.
        keeps_files: whether the descriptors of that packet belong to the machine.
        peer: the process that sends the packets of the other side.
        error: why the machine has given up, or is about to.
    """

    phase: Phase = Phase.TALKING
    owner: Owner = Owner.SENDER
    pending: Outgoing | None = None
    expected: tuple[Kind, int | None, int] | None = None
    last: Packet | None = None
    keeps_files: bool = False
    peer: Peer | None = None
    error: HandoffError | None = None


class Machine(ABC):
    """One side of a handoff.

    Args:
        operation: the handoff as a request, for errors.
        allow: a function that returns whether a process may take part.
    """

    _state: State

    def __init__(self, operation: Operation, allow: Allow) -> None:
        self.operation = operation
        self._allow = allow

    @property
    def pending(self) -> Outgoing | None:
        """The packet to send next; None if it is the other side's turn."""
        return self._state.pending

    @property
    def last(self) -> Packet | None:
        """The packet that `receive` accepted last."""
        return self._state.last

    @property
    def keeps_files(self) -> bool:
        """Whether the descriptors of `last` belong to the machine now; the driver closes others."""
        return self._state.keeps_files

    @property
    def owner(self) -> Owner:
        """Who may use the files."""
        return self._state.owner

    @property
    def peer(self) -> Peer | None:
        """The process that sends the packets of the other side, once it has sent one."""
        return self._state.peer

    @property
    def phase(self) -> Phase:
        """How far this side has come."""
        return self._state.phase

    @property
    def done(self) -> bool:
        """Whether there is nothing to send and nothing to wait for."""
        return self._state.phase in (Phase.DONE, Phase.FAILED, Phase.BROKEN)

    @property
    def awaits_death(self) -> bool:
        """Whether only the death of the other process can decide who owns the files."""
        return self._state.phase is Phase.CLAIMING

    @property
    def error(self) -> HandoffError | None:
        """Why the machine has given up; None if it has not."""
        return self._state.error

    @property
    def subject(self) -> str:
        """Words for the other side, for error messages."""
        return str(self._state.peer or "the other end of the socket")

    def meet(self, creator: Peer) -> None:
        """Check that the process that created the other end of the socket may take part.

        Raises:
            HandoffError: it may not (EPERM).
        """
        # If the socket is from socketpair(), this process itself created the other end. That says
        # nothing about the process that has the other end now.
        if creator.pid != os.getpid():
            self._check_allowed(creator, "made the other end of the socket")

    def sent(self, packet: Outgoing) -> None:
        """Go on after a packet was sent; do nothing if that was reported already."""
        if packet is not self._state.pending:
            return
        if packet.kind is Kind.REFUSED:
            self._fail()
        else:
            self._state = self._after_sending(packet.kind)

    @abstractmethod
    def _after_sending(self, kind: Kind) -> State:
        """Return the state after a packet was sent."""

    def receive(self, packet: Packet) -> None:
        """Go on after a packet was received; do nothing if that was reported already.

        Raises:
            HandoffError: the packet is too long, has no credentials or is not valid, is not the
                expected one, or another process sent it than the previous one (EBADMSG); it uses
                another version of the protocol (EPROTONOSUPPORT); its sender may not take part
                (EPERM); the kernel dropped descriptors from it (EMFILE, ENFILE or EACCES). The
                state is unchanged, and the packet still has its descriptors.
        """
        if packet is self._state.last:
            return
        if packet.fds_truncated:
            raise self._lost_descriptors_error()
        sender = self._check_sender(packet.sender)
        if packet.data_truncated:
            raise self.protocol_error("a packet is longer than any of the protocol")
        kind, number = self._parse(packet.data)
        if kind is Kind.REFUSED:
            self._fail(self._state.error or self._refusal_error(number, packet.data[HEAD.size :]))
            return
        if len(packet.data) != HEAD.size:
            raise self.protocol_error(f"{kind.name} has {len(packet.data)} bytes")
        self._check_expected(kind, number, len(packet.files))
        base = replace(
            self._state,
            last=packet,
            keeps_files=False,
            peer=sender,
            pending=None,
            expected=None,
        )
        self._state = self._after_receiving(base, kind, number)

    @abstractmethod
    def _after_receiving(self, base: Any, kind: Kind, number: int) -> State:
        """Return the state after an expected packet was received.

        Args:
            base: the present state, with the packet as `last`, and nothing pending or expected.
            kind: the kind of the packet.
            number: the number of the packet.

        Raises:
            HandoffError: see `receive`.
        """

    @abstractmethod
    def hung_up(self, *, dead: bool = False) -> None:
        """Go on after the end of the connection, when all packets before it were received.

        Args:
            dead: whether the other process is known to be dead.
        """

    @abstractmethod
    def peer_died(self) -> None:
        """Decide who owns the files, now that the other process is dead."""

    def give_up(self, error: BaseException) -> None:
        """End the handoff before it is decided, and tell the other side why.

        This does nothing if it is too late for that; see `owner`.
        """
        decided = (Phase.DONE, Phase.FAILED, Phase.GIVING_UP)
        if self._state.phase in decided or not self._can_give_up:
            return
        if not isinstance(error, HandoffError):
            number = error.errno if isinstance(error, RequestError) else ECANCELED
            hint = error.hint if isinstance(error, RequestError) else ""
            hint = hint or f"{type(error).__name__}: {error}"
            error = HandoffError(number or EIO, self.operation.name, self.subject, hint)
        reason = error.hint or error.strerror or ""
        refusal = Outgoing.make(Kind.REFUSED, error.errno or EIO, reason=reason)
        self._state = replace(
            self._state,
            phase=Phase.GIVING_UP,
            owner=self._owner_while_giving_up,
            pending=refusal,
            expected=None,
            error=error,
        )

    def cannot_go_on(self, error: RequestError) -> None:
        """Go on after a wait that was too long, or a packet that the kernel refused to send."""
        self.give_up(error)

    @property
    @abstractmethod
    def _can_give_up(self) -> bool:
        """Whether this side may still keep the files from changing hands."""

    @property
    @abstractmethod
    def _owner_while_giving_up(self) -> Owner:
        """Who owns the files while it is not known whether the other side will hear of it."""

    @abstractmethod
    def undecided_error(self) -> HandoffError:
        """Return the exception for a handoff whose files have no owner that this side knows."""

    @abstractmethod
    def close(self) -> None:
        """Close the descriptors that belong to the machine."""

    def refusal_is_lost(self) -> None:
        """Go on after a refusal that could not be sent because of a lack of room or memory."""
        if self._state.phase is Phase.GIVING_UP and self._state.owner is Owner.SENDER:
            self._fail()

    def cannot_send(self, packet: Outgoing) -> None:
        """Go on after a packet could not be sent because the other end is closed.

        What the other side sent before that still counts. So this side goes on as if it had sent
        the packet, and finds either an answer or the end of the connection.
        """
        self.sent(packet)

    def _fail(self, error: HandoffError | None = None) -> None:
        self._state = replace(
            self._state,
            phase=Phase.FAILED,
            owner=Owner.SENDER,
            pending=None,
            expected=None,
            error=error or self._state.error,
        )

    def _hung_up_error(self, hint: str) -> HandoffError:
        return HandoffError(ECONNRESET, self.operation.name, self.subject, hint)

    def _check_expected(self, kind: Kind, number: int, fds: int) -> None:
        actual = f"{kind.name} {number}"
        if self._state.expected is None:
            raise self.protocol_error(f"{actual} before its turn")
        wanted, wanted_number, wanted_fds = self._state.expected
        if kind is not wanted or wanted_number not in (None, number):
            number_text = "" if wanted_number is None else f" {wanted_number}"
            raise self.protocol_error(f"{actual} instead of {wanted.name}{number_text}")
        if fds != wanted_fds:
            raise self.protocol_error(f"{fds} descriptors with {kind.name}, not {wanted_fds}")

    def _parse(self, data: bytes) -> tuple[Kind, int]:
        if len(data) < HEAD.size:
            raise self.protocol_error(f"a packet has {len(data)} bytes")
        magic, version, kind, number = HEAD.unpack_from(data)
        if magic != MAGIC:
            raise self.protocol_error(f"a packet begins with {magic!r}")
        if version != VERSION:
            hint = f"It uses version {version} of the protocol, and this pyluo version {VERSION}"
            raise HandoffError(EPROTONOSUPPORT, self.operation.name, self.subject, hint)
        try:
            return Kind(kind), number
        except ValueError:
            raise self.protocol_error(f"a packet is of the unknown kind {kind}") from None

    def _check_sender(self, sender: Peer | None) -> Peer:
        if sender is None:
            raise self.protocol_error("a packet has no credentials")
        if self._state.peer is None:
            self._check_allowed(sender, "sends packets there")
        elif sender != self._state.peer:
            raise self.protocol_error(f"{sender} sends packets in its place")
        return sender

    def _check_allowed(self, peer: Peer, role: str) -> None:
        if not self._allow(peer):
            hint = f"{peer} {role}, and it is not allowed to take part"
            raise HandoffError(EPERM, self.operation.name, self.subject, hint)

    def protocol_error(self, problem: str) -> HandoffError:
        """Return the exception for a packet that violates the protocol."""
        hint = f"The other side broke the protocol: {problem}"
        return HandoffError(EBADMSG, self.operation.name, self.subject, hint)

    def _refusal_error(self, number: int, text: bytes) -> HandoffError:
        reason = "".join(
            each if each.isprintable() else "?" for each in text.decode(errors="replace")
        )
        known = number if number in errorcode else EPROTO
        hint = f"The other process gave up: {reason}"
        return HandoffError(known, self.operation.name, self.subject, hint)

    def _lost_descriptors_error(self) -> HandoffError:
        """Return the exception for descriptors that the kernel dropped from a packet.

        The kernel does not report the reason, so this method opens a descriptor. If that fails, a
        descriptor limit was the reason, and the exception gets that errno; otherwise this method
        assumes that a security module was the reason (EACCES).
        """
        try:
            os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            hint = "The descriptors do not fit: see RLIMIT_NOFILE (ulimit -n), or fs.file-max"
            return HandoffError(error.errno or EIO, self.operation.name, self.subject, hint)
        hint = "A security module of the kernel blocked a descriptor: see its rules"
        return HandoffError(EACCES, self.operation.name, self.subject, hint)
