"""`Participant`: a VMM's side of an update that several VMMs take part in."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from errno import ECONNRESET, EPROTO, ETIMEDOUT
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from pyluo.errors import RequestError
from pyluo.handoff import connect
from pyluo.operation import Operation
from pyluo.peer import Packet
from pyluo.session import IncomingSession, OutgoingSession, session_from_fd
from pyluo.update.messages import (
    VERSION,
    Abort,
    Answer,
    CreateSession,
    Hello,
    Jump,
    Message,
    Prepare,
    Ready,
    RetrieveSession,
    Running,
    Unable,
    Welcome,
    decode,
    encode,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from pyluo.descriptor import ReceivedFd

__all__ = ["SOCKET", "Participant"]

SOCKET = Path("/run/pyluo-update.socket")
"""Where the coordinator listens, unless both sides are told otherwise."""

_PATIENCE = 30.0  # seconds for the coordinator to answer
_JOIN = Operation("join the update")
_TALK = Operation("talk to the coordinator")

M = TypeVar("M", Welcome, Answer)


class Participant:
    """A VMM's connection to the coordinator of updates.

    The VMM calls `receive` and does what it gets: pauses and stores its VM for a `Prepare`, and
    lets it run on for an `Abort`. If the connection ends while the VM is stored, and there was no
    `Jump`, there will be no jump: the VMM lets the VM run on, and joins again.

    It is a `SessionSource` as well, for a VMM that may not open the device: stores take it as
    `device`. It gives out sessions only of the VM's own name, or of names that begin with that name
    and a dot.

    One thread may wait in `receive` while another one answers; otherwise, only one thread at a time
    may use the object.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._name = name
        self._waiting: deque[Prepare | Abort | Jump] = deque()

    @classmethod
    def join(
        cls,
        name: str,
        *,
        path: str | os.PathLike[str] = SOCKET,
        stored: bool = False,
        paused: float | None = None,
    ) -> Self:
        """Announce a VM to the coordinator, so that it takes part in every update.

        Args:
            name: the name of the VM, as that of a session.
            path: where the coordinator listens.
            stored: whether the VM is paused and stored, because it joins again after the end of
                another connection.
            paused: for how many seconds the VM did not run, as its VMM measured it, if it has just
                been resumed after a jump.

        Raises:
            HandoffError: see `handoff.connect`.
            RequestError: the coordinator refuses, as another participant has the name
                (ECONNRESET), or does not answer (ETIMEDOUT); or it uses another version
                (EPROTONOSUPPORT).
        """
        participant = cls(connect(path), name)
        try:
            participant._send(Hello(version=VERSION, name=name, stored=stored, paused=paused))
            participant._wait_for(Welcome)
        except BaseException:
            participant.close()
            raise
        return participant

    def fileno(self) -> int:
        """Return the number of the connection's descriptor, which is readable if `receive` is due.

        Raises:
            ValueError: the connection was closed.
        """
        number = self._connection.fileno()
        if number < 0:
            raise ValueError("the connection was closed")
        return number

    def receive(self, timeout: float | None = None) -> Prepare | Abort | Jump | None:
        """Wait for what the coordinator wants.

        Args:
            timeout: seconds to wait; None for no limit.

        Returns:
            What it wants; None if the connection has ended.

        Raises:
            TimeoutError: nothing came in time.
            RequestError: what came is no message (EBADMSG), or none for a participant (EPROTO).
        """
        if self._waiting:
            return self._waiting.popleft()
        received = self._receive(timeout)
        if received is None:
            return None
        message, files = received
        _close(files)
        if not isinstance(message, Prepare | Abort | Jump):
            raise _TALK.error(EPROTO, self._name, f"It says {message}")
        return message

    def ready(self, prepare: Prepare, sessions: Sequence[str]) -> None:
        """Say that the VM is paused, and all of it in outgoing sessions.

        Args:
            prepare: what this is the answer to.
            sessions: the names of the sessions; the coordinator checks before the jump that
                somebody has them open.

        Raises:
            RequestError: the connection has ended (EPIPE or ECONNRESET).
        """
        self._send(Ready(round=prepare.round, sessions=list(sessions)))

    def unable(self, prepare: Prepare, reason: str) -> None:
        """Say that the VM runs on; the update is aborted for all, with this reason.

        Raises:
            RequestError: as `ready`.
        """
        self._send(Unable(round=prepare.round, reason=reason))

    def running(self, abort: Abort) -> None:
        """Say that the VM runs again.

        Raises:
            RequestError: as `ready`.
        """
        self._send(Running(round=abort.round))

    def create_session(self, name: str) -> OutgoingSession:
        """Have the coordinator create an outgoing session; see `LiveUpdate.create_session`.

        Raises:
            RequestError: as `LiveUpdate` and `LiveUpdate.create_session`, by errno; the name is not
                the VM's (EACCES); the connection has ended (ECONNRESET).
        """
        session = self._get_session(CreateSession(name=name))
        assert isinstance(session, OutgoingSession)
        return session

    def retrieve_session(self, name: str) -> IncomingSession:
        """Have the coordinator retrieve an incoming session; see `LiveUpdate.retrieve_session`.

        Raises:
            RequestError: as `create_session`.
        """
        session = self._get_session(RetrieveSession(name=name))
        assert isinstance(session, IncomingSession)
        return session

    def close(self) -> None:
        """Leave: the VM takes part in no update any more."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_session(
        self, request: CreateSession | RetrieveSession
    ) -> OutgoingSession | IncomingSession:
        self._send(request)
        answer, files = self._wait_for(Answer)
        try:
            if answer.errno:
                raise RequestError(
                    answer.errno, type(request).__name__, f"session {request.name!r}", answer.text
                )
            if len(files) != 1:
                raise _TALK.error(EPROTO, self._name, f"It gave {len(files)} sessions")
            session = session_from_fd(files[0].fileno())
            files[0].detach()
            return session
        except BaseException:
            _close(files)
            raise

    def _wait_for(self, kind: type[M]) -> tuple[M, list[ReceivedFd]]:
        """Wait for an answer; other messages that come before it wait for `receive`."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                received = self._receive(max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise _JOIN.error(
                    ETIMEDOUT, self._name, "The coordinator does not answer"
                ) from None
            if received is None:
                hint = "The coordinator has ended the connection: its log says why"
                raise _JOIN.error(ECONNRESET, self._name, hint)
            message, files = received
            if isinstance(message, kind):
                return message, files
            _close(files)
            if not isinstance(message, Prepare | Abort | Jump):
                raise _TALK.error(EPROTO, self._name, f"It says {message}")
            self._waiting.append(message)

    def _send(self, message: Message) -> None:
        with _TALK.raising(self._name):
            self._connection.send(encode(message), socket.MSG_NOSIGNAL)

    def _receive(self, timeout: float | None) -> tuple[Message, list[ReceivedFd]] | None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise TimeoutError
        packet = Packet()
        result = packet.receive(self._connection.fileno())
        if result <= 0:
            return None
        files = packet.files
        try:
            return decode(packet.data), files
        except BaseException:
            _close(files)
            raise


def _close(files: list[ReceivedFd]) -> None:
    for file in files:
        file.close()
