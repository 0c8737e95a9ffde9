"""The sender's side of a handoff, without sockets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from errno import EMFILE, EPIPE, ETIMEDOUT, ETOOMANYREFS
from typing import TYPE_CHECKING

from pyluo._sys import PacketBuffer
from pyluo.descriptor import fileno_to_share
from pyluo.errors import HandoffError
from pyluo.handoff.machine import Machine, Owner, Phase, State
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.packets import Kind, Outgoing
from pyluo.operation import Operation, raising

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyluo.descriptor import Descriptor
    from pyluo.handoff.machine import Allow

__all__ = ["Sender"]

SEND = Operation(
    "send handoff",
    HandoffError,
    {
        ETIMEDOUT: (
            "The other process sent nothing in time; is it in receive()? Nothing was handed over"
        ),
        EPIPE: "The other process has hung up; nothing was handed over",
        EMFILE: "No descriptor is free: raise RLIMIT_NOFILE (ulimit -n)",
        ETOOMANYREFS: (
            "Too many descriptors of this user are in flight through sockets: raise RLIMIT_NOFILE, "
            "or try again when others were received; nothing was handed over"
        ),
    },
)


@dataclass(frozen=True, slots=True)
class _State(State):
    """The state of the sender.

    Attributes:
        index: the number of descriptors that are sent, or are to be sent next.
        offered: whether the receiver may have something already.
        committed: whether the receiver was told that it may use the files.
    """

    index: int = 0
    offered: bool = False
    committed: bool = False


class Sender(Machine):
    """The side that has the files.

    It owns them until COMMIT is sent. From then on it does not know, until the receiver answers
    TAKEN, answers REFUSED, or is dead.

    Args:
        files: a descriptor for each name; they must stay open until the machine is done.
        state: any bytes for the receiver.
        allow: a function that returns whether a process may receive the handoff.

    Raises:
        ValueError: a name is empty or longer than 255 bytes in UTF-8.
        RequestError: a descriptor is not open (EBADF); see also `Memfd.create`.
    """

    _state: _State

    def __init__(self, files: Mapping[str, Descriptor | int], state: bytes, allow: Allow) -> None:
        super().__init__(SEND, allow)
        self._numbers = tuple(fileno_to_share(file, SEND.name) for file in files.values())
        entries = []
        for name, number in zip(files, self._numbers, strict=True):
            with raising("fstat", f"descriptor {number}"):
                entries.append(Entry.of(name, number))
        self._manifest = Manifest(tuple(entries), state).to_memfd()
        self._state = _State(expected=(Kind.READY, 0, 0))

    def _after_receiving(self, base: _State, kind: Kind, number: int) -> _State:
        count = len(self._numbers)
        if kind is Kind.READY:
            offer = Outgoing.make(Kind.OFFER, count, fds=(self._manifest.fileno(),))
            return replace(base, pending=offer)
        if kind is Kind.WANT:
            fds = self._numbers[number : number + PacketBuffer.MAX_FDS]
            files = Outgoing.make(Kind.FILES, number, fds=fds)
            return replace(base, pending=files, index=number + len(fds))
        if kind is Kind.COMPLETE:
            return replace(base, pending=Outgoing.make(Kind.COMMIT, count))
        return replace(base, phase=Phase.DONE, owner=Owner.RECEIVER)

    def _after_sending(self, kind: Kind) -> _State:
        count = len(self._numbers)
        base = replace(self._state, pending=None, offered=True)
        if kind is Kind.COMMIT:
            expected = (Kind.TAKEN, count, 0)
            return replace(base, expected=expected, owner=Owner.UNDECIDED, committed=True)
        if base.index < count:
            return replace(base, expected=(Kind.WANT, base.index, 0))
        return replace(base, expected=(Kind.COMPLETE, count, 0))

    def cannot_send(self, packet: Outgoing) -> None:
        """Go on after a packet could not be sent; a COMMIT that nobody can get gives nothing up."""
        if packet.kind is Kind.COMMIT:
            if packet is self._state.pending:
                self._state = replace(self._state, pending=None)
        else:
            super().cannot_send(packet)

    def hung_up(self, *, dead: bool = False) -> None:
        """Go on after the end of the connection, when all packets before it were received.

        A receiver ends the connection without REFUSED or TAKEN only by its death. Before COMMIT is
        sent, the files belong to the sender in any case.
        """
        if self._state.committed:
            claiming = replace(self._state, phase=Phase.CLAIMING, expected=None)
            self._state = claiming
            if dead:
                self.peer_died()
        else:
            what = "is dead" if dead else "has hung up"
            self.give_up(self._hung_up_error(f"The other process {what}; nothing was handed over"))

    def peer_died(self) -> None:
        """Take the files back: the receiver is dead, and has not said that it took them."""
        self._fail(
            self._state.error
            or self._hung_up_error(
                "The other process died before it took the files over; this process still has them"
            )
        )

    def concede(self) -> None:
        """Leave the files to the receiver, although it has not said that it took them."""
        if self._state.committed and self._state.phase is not Phase.FAILED:
            self._state = replace(
                self._state, phase=Phase.DONE, owner=Owner.RECEIVER, expected=None
            )

    @property
    def _can_give_up(self) -> bool:
        return not self._state.committed

    @property
    def _owner_while_giving_up(self) -> Owner:
        return Owner.UNDECIDED if self._state.offered else Owner.SENDER

    def undecided_error(self) -> HandoffError:
        """Return the exception for a handoff that the receiver has not confirmed."""
        return HandoffError(
            ETIMEDOUT,
            self.operation.name,
            self.subject,
            "The receiver may use the files by now, and has not said whether it does. Do not use "
            "them until `unfinished.take_back()` has returned",
        )

    def close(self) -> None:
        """Close the manifest, when the machine is done; the files stay the caller's."""
        self._manifest.close()
