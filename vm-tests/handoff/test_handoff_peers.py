"""Handing over between users, or after another process took a side's place.

Acting as another user needs root, so the tests run in a guest.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import sys
import traceback
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pyluo import HandoffError, Memfd, handoff
from pyluo.handoff.conversation import Kind
from pyluo.peer import MAX_FDS, Packet, send_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.in_guest

NOBODY = 65534
TIMEOUT = 30.0  # seconds
HEAD = struct.Struct("<8sHHI")
READY = HEAD.pack(b"pyluoHOP", 1, Kind.READY, 0)


def test_nothing_is_handed_to_another_user() -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:

        def successor() -> None:
            os.seteuid(NOBODY)
            send_packet(theirs, READY)
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
            in_child(
                lambda: expect_refusal(handoff.send, ReplacedSocket(theirs, other), {"ram": ram})
            ),
            pytest.raises(HandoffError, match="sends packets in its place") as caught,
        ):
            handoff.receive(ours)
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("other", ["user", "process"])
def test_another_user_or_process_cannot_take_the_receivers_place(other: str) -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:
        with (
            in_child(lambda: expect_refusal(handoff.receive, ReplacedSocket(theirs, other))),
            pytest.raises(HandoffError, match="sends packets in its place") as caught,
        ):
            handoff.send(ours, {"ram": ram})
        assert caught.value.errno == errno.EBADMSG


def test_too_many_descriptors_on_their_way_are_an_error_that_says_so() -> None:
    with pair() as (ours, theirs), Memfd.create("ram", 4096) as ram:

        def predecessor() -> None:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with pair() as busy:
                send_packet(busy[0], b"unread", [ram.fileno()] * MAX_FDS)
                resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
                with pytest.raises(HandoffError, match="RLIMIT_NOFILE") as caught:
                    handoff.send(theirs, {"ram": ram})
                assert caught.value.errno == errno.ETOOMANYREFS

        send_packet(ours, READY)
        with in_child(predecessor):
            assert receive_packets(ours) == [(Kind.REFUSED, errno.ETOOMANYREFS, 0)]


# Helpers of the tests above.


class ReplacedSocket(socket.socket):
    """A socket whose owner becomes another user, or another process, after its first packet."""

    def __init__(self, end: socket.socket, other: str) -> None:
        super().__init__(fileno=os.dup(end.fileno()))
        self.other = other
        self.has_sent = False

    def sendmsg(self, *arguments: Any) -> int:
        self.has_sent = True
        return super().sendmsg(*arguments)

    def recvmsg(self, *arguments: Any) -> Any:
        received = super().recvmsg(*arguments)
        if self.has_sent and self.other == "user":
            os.seteuid(NOBODY)
        elif self.has_sent and (pid := os.fork()):
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        self.has_sent = False
        return received


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


def expect_refusal(call: Callable[..., object], *arguments: object) -> None:
    """Check that a call fails with the error that its peer reports too."""
    with pytest.raises(HandoffError, match="sends packets in its place") as caught:
        call(*arguments)
    assert caught.value.errno == errno.EBADMSG


def receive_packets(end: socket.socket) -> list[tuple[Kind, int, int]]:
    """Return the kind, the number and the count of descriptors of each packet, until the end."""
    end.settimeout(TIMEOUT)
    packets = []
    while (packet := Packet.receive(end, 4096)).data:
        _, _, kind, number = HEAD.unpack_from(packet.data)
        packets.append((Kind(kind), number, len(packet.fds)))
        packet.close()
    return packets
