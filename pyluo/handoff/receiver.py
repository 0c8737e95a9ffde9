"""The receiver's side of a handoff, without sockets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from errno import EMFILE, ENODATA, EPIPE, ETIMEDOUT
from typing import TYPE_CHECKING

from pyluo._sys import PacketBuffer
from pyluo.errors import HandoffError
from pyluo.handoff.machine import Machine, Owner, Phase, State
from pyluo.handoff.manifest import Manifest
from pyluo.handoff.packets import Kind, Outgoing
from pyluo.handoff.received import Handoff
from pyluo.operation import Operation

if TYPE_CHECKING:
    from pyluo.descriptor import ReceivedFd
    from pyluo.errors import RequestError
    from pyluo.handoff.machine import Allow

__all__ = ["Receiver"]

RECEIVE = Operation(
    "receive handoff",
    HandoffError,
    {
        ETIMEDOUT: (
            "The other process sent nothing in time; is it in send()? Nothing was taken over"
        ),
        EPIPE: "The other process has hung up; nothing was taken over",
        EMFILE: "No descriptor is free: raise RLIMIT_NOFILE (ulimit -n)",
    },
)


@dataclass(frozen=True, slots=True)
class _State(State):
    """The state of the receiver.

    Attributes:
        manifest: what the sender has announced.
        files: the descriptors that have come, in the order of the manifest.
        taken: the result, once the files belong to the receiver.
    """

    manifest: Manifest | None = None
    files: tuple[ReceivedFd, ...] = ()
    taken: Handoff | None = None


class Receiver(Machine):
    """The side that gets the files.

    It owns them once it has received COMMIT, or once it has all of them and the sender is dead
    without having said REFUSED.

    Args:
        allow: a function that returns whether to accept a handoff from a process.
        max_files: the largest number of descriptors to accept.
        max_state: the largest state to accept, in bytes.
    """

    _state: _State

    def __init__(self, allow: Allow, max_files: int, max_state: int) -> None:
        super().__init__(RECEIVE, allow)
        self._max_files = max_files
        self._max_state = max_state
        self._state = _State(pending=Outgoing.make(Kind.READY))

    @property
    def taken(self) -> Handoff | None:
        """The files and the state, once they belong to this process."""
        return self._state.taken

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of the descriptors that were announced and have not come."""
        if self._state.manifest is None:
            return ()
        return tuple(each.name for each in self._state.manifest.entries[len(self._state.files) :])

    @property
    def has_received(self) -> bool:
        """Whether anything has come that might be the last of its kind."""
        return self._state.manifest is not None and self._state.taken is None

    def _after_receiving(self, base: _State, kind: Kind, number: int) -> _State:
        assert base.last is not None
        files = base.last.files
        if kind is Kind.OFFER:
            manifest = Manifest.read(
                files[0].fileno(), max_files=self._max_files, max_state=self._max_state
            )
            if number != len(manifest.entries):
                raise self.protocol_error(
                    f"{number} descriptors, and a manifest of {len(manifest.entries)}"
                )
            return self._request_more(replace(base, manifest=manifest))
        if kind is Kind.FILES:
            assert base.manifest is not None
            for entry, file in zip(base.manifest.entries[len(base.files) :], files, strict=False):
                if not entry.matches(file.fileno()):
                    raise self.protocol_error(f"{entry.name!r} is of another file than announced")
                file.undecided = True
            return self._request_more(replace(base, files=(*base.files, *files), keeps_files=True))
        return replace(base, owner=Owner.RECEIVER, pending=Outgoing.make(Kind.TAKEN, number))

    def _request_more(self, state: _State) -> _State:
        """Return a state with the next request; COMPLETE if everything has come."""
        assert state.manifest is not None
        count = len(state.manifest.entries)
        kind = Kind.COMPLETE if len(state.files) == count else Kind.WANT
        return replace(state, pending=Outgoing.make(kind, len(state.files)))

    def _taken(self, state: _State) -> _State:
        """Return the state in which the files belong to this process."""
        assert state.manifest is not None
        for file in state.files:
            file.undecided = False
        names = [entry.name for entry in state.manifest.entries]
        files = dict(zip(names, state.files, strict=False))
        taken = Handoff(files, state.manifest.state, state.peer, tuple(names[len(files) :]))
        return replace(
            state,
            phase=Phase.DONE,
            owner=Owner.RECEIVER,
            pending=None,
            expected=None,
            files=(),
            taken=taken,
        )

    def _after_sending(self, kind: Kind) -> _State:
        base = replace(self._state, pending=None)
        count = len(base.manifest.entries) if base.manifest else 0
        if kind is Kind.READY:
            return replace(base, expected=(Kind.OFFER, None, 1))
        if kind is Kind.WANT:
            more = min(count - len(base.files), PacketBuffer.MAX_FDS)
            return replace(base, expected=(Kind.FILES, len(base.files), more))
        if kind is Kind.COMPLETE:
            return replace(base, expected=(Kind.COMMIT, count, 0))
        return self._taken(base)

    def hung_up(self, *, dead: bool = False) -> None:
        """Go on after the end of the connection, when all packets before it were received.

        A sender ends the connection without REFUSED only by its death. So the files may belong to
        this side, which `claim` and the proof of the death decide.
        """
        if self._state.owner is Owner.RECEIVER:
            self._state = self._taken(self._state)
        elif self._state.manifest is not None:
            self._state = replace(
                self._state,
                phase=Phase.BROKEN,
                owner=Owner.UNDECIDED,
                pending=None,
                expected=None,
            )
        else:
            what = "is dead" if dead else "has hung up"
            self.give_up(self._hung_up_error(f"The other process {what}; nothing was taken over"))

    def cannot_go_on(self, error: RequestError) -> None:
        """Give up; but after COMMIT the files are this side's, whether or not it can say so."""
        if self._state.phase is Phase.TALKING and self._state.owner is Owner.RECEIVER:
            self._state = self._taken(self._state)
        else:
            super().cannot_go_on(error)

    def claim(self, *, partial: bool) -> None:
        """Claim the files of a broken handoff: they are this side's once the sender is dead.

        Args:
            partial: whether to claim them although some have not come.

        Raises:
            HandoffError: some have not come (ENODATA).
        """
        if self.missing and not partial:
            raise HandoffError(
                ENODATA,
                self.operation.name,
                self.subject,
                f"{len(self.missing)} descriptors have not come, among them "
                f"{self.missing[0]!r}; partial=True takes the others over",
            )
        self._state = replace(self._state, phase=Phase.CLAIMING)

    def unclaim(self) -> None:
        """Go back to the broken handoff; the sender was not found dead."""
        if self._state.phase is Phase.CLAIMING:
            self._state = replace(self._state, phase=Phase.BROKEN)

    def peer_died(self) -> None:
        """Take the claimed files over: the sender is dead, and has not said that it keeps them."""
        self._state = self._taken(self._state)

    def undecided_error(self) -> HandoffError:
        """Return the exception for a handoff whose sender has hung up without a word."""
        if self._state.phase is Phase.CLAIMING:
            hint = "It still lives, or a thread of it does, so that it may still use the files"
            return HandoffError(ETIMEDOUT, self.operation.name, self.subject, hint)
        what = "all files" if not self.missing else "some of the files"
        return self._hung_up_error(
            "The other process has hung up without a word, as it does when it dies. This process "
            f"has {what}, and may use them once the other one is dead: `unfinished.take_over()`"
        )

    @property
    def _can_give_up(self) -> bool:
        # Until TAKEN is sent, the sender has not let go of them.
        return True

    @property
    def _owner_while_giving_up(self) -> Owner:
        return Owner.SENDER

    def close(self) -> None:
        """Close the files that have come, unless they were handed out."""
        for file in self._state.files:
            file.close()

    def leave_open(self) -> None:
        """Give the files that have come up without closing them, because they may be the last."""
        for file in self._state.files:
            if not file.closed:
                file.detach()
