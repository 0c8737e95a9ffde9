"""Handing over between users, or after another process took a side's place.

Acting as another user needs root, so the tests run in a guest.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import sys
import traceback
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from pyluo import HandoffError, Memfd, handoff
from pyluo._sys import PacketBuffer
from pyluo.handoff.packets import HEAD, Kind, Outgoing
from pyluo.peer import Packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.handoff.conversation import Conversation

pytestmark = pytest.mark.in_guest

NOBODY = 65534
TIMEOUT = 30.0  # seconds
READY = Outgoing.make(Kind.READY)


def test_nothing_is_handed_to_another_user() -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:

        def successor() -> None:
            os.seteuid(NOBODY)
            send_packet(theirs, READY.data)
            assert receive_packets(theirs) == [(Kind.REFUSED, errno.EPERM, 0)]

        with in_child(successor), pytest.raises(HandoffError, match="user 65534") as caught:
            handoff.send(ours, {"ram": ram})
        assert caught.value.errno == errno.EPERM


def test_nothing_is_taken_from_another_user() -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:

        def predecessor() -> None:
            os.seteuid(NOBODY)
            with pytest.raises(HandoffError, match="user 65534") as caught:
                handoff.send(theirs, {"ram": ram})
            assert caught.value.errno == errno.EPERM

        with in_child(predecessor), pytest.raises(HandoffError, match="user 65534") as caught:
            handoff.receive(ours)
        assert caught.value.errno == errno.EPERM


def test_who_made_the_other_end_counts_though_somebody_else_speaks() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # a name outside the file system, so that any user may connect
        listener.listen()

        def successor() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                os.seteuid(NOBODY)
                connection.connect(listener.getsockname())
                os.seteuid(0)
                with pytest.raises(HandoffError, match="made the other end") as caught:
                    handoff.receive(connection)
                assert caught.value.errno == errno.EPERM

        with in_child(successor):
            connection, _ = listener.accept()
            with connection, pytest.raises(HandoffError, match="made the other end") as caught:
                handoff.send(connection, {})
        assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("other", ["user", "process"])
def test_another_user_or_process_cannot_take_the_senders_place(other: str) -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:
        with (
            in_child(lambda: replace_and_fail(handoff.Sending(theirs, {"ram": ram}), other)),
            pytest.raises(HandoffError, match="sends packets in its place") as caught,
        ):
            handoff.receive(ours)
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("other", ["user", "process"])
def test_another_user_or_process_cannot_take_the_receivers_place(other: str) -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:
        with (
            in_child(lambda: replace_and_fail(handoff.Receiving(theirs), other)),
            pytest.raises(HandoffError, match="sends packets in its place") as caught,
        ):
            handoff.send(ours, {"ram": ram})
        assert caught.value.errno == errno.EBADMSG


def test_too_many_descriptors_on_their_way_are_an_error_that_says_so() -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:

        def predecessor() -> None:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with pair() as busy:
                send_packet(busy[0], b"unread", [ram.fileno()] * PacketBuffer.MAX_FDS)
                resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
                with pytest.raises(HandoffError, match="RLIMIT_NOFILE") as caught:
                    handoff.send(theirs, {"ram": ram})
                assert caught.value.errno == errno.ETOOMANYREFS

        send_packet(ours, READY.data)
        with in_child(predecessor):
            assert receive_packets(ours) == [(Kind.REFUSED, errno.ETOOMANYREFS, 0)]


# Helpers of the tests above.


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        yield stack.enter_context(ours), stack.enter_context(theirs)


@contextmanager
def in_child(function: Callable[[], object]) -> Iterator[None]:
    """Run a function in a child process during the block; the function must succeed."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    try:
        yield
    finally:
        _, status = os.waitpid(pid, 0)
    assert status == 0


def replace_and_fail(conversation: Conversation, other: str) -> None:
    """Send the first packet, go on as another user or process, and fail as the peer does."""
    conversation._begin()
    while conversation._machine.pending is None:
        select.select([conversation._socket], [], [], TIMEOUT)
        conversation._receive()
    conversation._send(conversation._machine.pending)
    if other == "user":
        os.seteuid(NOBODY)
    elif pid := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    conversation._process = os.getpid()  # pyluo itself would refuse to go on
    go_on = getattr(
        conversation, "send" if isinstance(conversation, handoff.Sending) else "receive"
    )
    with pytest.raises(HandoffError, match="sends packets in its place") as caught:
        go_on()
    assert caught.value.errno == errno.EBADMSG


def send_packet(end: socket.socket, data: bytes, fds: list[int] | None = None) -> None:
    assert PacketBuffer(data, fds or []).send(end.fileno()) == len(data)


def receive_packets(end: socket.socket) -> list[tuple[Kind, int, int]]:
    """Return the kind, the number and the count of descriptors of each packet, until the end."""
    packets: list[tuple[Kind, int, int]] = []
    while True:
        packet = Packet()
        select.select([end], [], [], TIMEOUT)
        received = packet.receive(end.fileno())
        if received == 0:
            return packets
        assert received > 0, os.strerror(-received)
        _, _, kind, number = HEAD.unpack_from(packet.data)
        packets.append((Kind(kind), number, len(packet.files)))
        packet.close()
