"""Asking the coordinator for an update, or who takes part."""

from __future__ import annotations

import select
import socket
from errno import EBADMSG, ECONNRESET
from typing import TYPE_CHECKING

from pyluo.handoff import connect
from pyluo.operation import Operation
from pyluo.peer import Packet
from pyluo.update.messages import JUMP, Done, Progress, Status, Update, decode, encode, error

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

__all__ = ["ask"]

_ASK = Operation("ask the coordinator")


def ask(path: str | os.PathLike[str], request: Update | Status) -> Iterator[Progress | Done]:
    """Ask the coordinator that listens at `path`, and yield its answers.

    The last one is `Done`, or the `Progress` by which a jump is announced: under systemd the
    coordinator ends before the host jumps. Closing the iterator before that aborts the update.

    Raises:
        HandoffError: see `handoff.connect`.
        RequestError: the coordinator has ended the connection (ECONNRESET), or what it says is no
            answer (EBADMSG).
    """
    with connect(path) as connection:
        with _ASK.raising(str(path)):
            connection.send(encode(request), socket.MSG_NOSIGNAL)
        is_jumping = False
        while True:
            select.select([connection], [], [])
            packet = Packet()
            if packet.receive(connection.fileno()) <= 0:
                if is_jumping:
                    return
                raise _ASK.error(
                    ECONNRESET, str(path), "It has ended the connection: its log says why"
                )
            for file in packet.files:  # it sends none
                file.close()
            answer = decode(packet.data)
            if not isinstance(answer, Progress | Done):
                raise error(EBADMSG, f"The coordinator says {answer}")
            if isinstance(answer, Progress):
                is_jumping = answer.text == JUMP
            yield answer
            if isinstance(answer, Done):
                return
