"""Handing over through a socket, on the host's own kernel, because it needs no live update.

Tests that act as another user need root, and are in vm-tests/handoff/test_handoff_peers.py.

Failures are provoked in two ways: a relay between the two sides changes the packets; or one side
finds all packets of a conversation in its socket, which were recorded before and then changed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyluo
from pyluo import HandoffError, Memfd, OwnedFd, RequestError, Seal, handoff
from pyluo.handoff import Peer

from .packets import (
    Packet,
    pack,
    receive_packet,
    received_packets,
    send_packet,
    send_packets,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    Pair = tuple[socket.socket, socket.socket]
    from .packets import Sent

    Change = Callable[[int, bytes, list[int]], Sent]

SEALS = Seal.SEAL | Seal.SHRINK | Seal.GROW | Seal.WRITE
HEADER = struct.Struct("<8sIIQQQ32s")


def open_fds() -> dict[int, tuple[str, bool]]:
    """Return the link of each open descriptor, and whether a child would inherit it."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself is closed
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}"), os.get_inheritable(int(name))
    return found


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield new_pair(stack)


def new_pair(stack: ExitStack) -> Pair:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return stack.enter_context(ours), stack.enter_context(theirs)


@contextmanager
def memfds(*names: str) -> Iterator[dict[str, OwnedFd]]:
    """Return a memfd for each name, with the name as its contents."""
    with ExitStack() as stack:
        files: dict[str, OwnedFd] = {}
        for name in names:
            files[name] = memfd = stack.enter_context(Memfd.create("file", 0))
            memfd.write(name.encode(), 0)
        yield files


def send_and_receive(
    ours: socket.socket,
    theirs: socket.socket,
    files: Mapping[str, OwnedFd | int],
    state: bytes = b"",
    **receiving: Any,
) -> tuple[Peer | BaseException, handoff.Handoff | BaseException]:
    """Hand over in two threads; return the result or the error of either side."""
    with ThreadPoolExecutor(1) as sender:
        sending = sender.submit(handoff.send, ours, files, state)
        try:
            received: handoff.Handoff | BaseException = handoff.receive(theirs, **receiving)
        except HandoffError as error:
            received = error
        return outcome(sending), received


def outcome(future: Future[Any]) -> Any:
    error = future.exception()
    return error if error is not None else future.result()


def hand_over(pair: Pair, files: Mapping[str, OwnedFd | int], state: bytes = b"") -> Any:
    sent, received = send_and_receive(*pair, files, state)
    assert isinstance(sent, Peer), sent
    assert isinstance(received, handoff.Handoff), received
    return received


def run_in_child(function: Callable[[], None]) -> int:
    """Run a function in a child process, and return its PID."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def exited_cleanly(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


# What is received


@pytest.mark.parametrize("count", [0, 1, 252, 253, 254, 1000])
def test_any_number_of_descriptors_arrives_in_order_and_close_on_exec(
    pair: Pair, count: int
) -> None:
    with memfds(*(f"file {number}" for number in reversed(range(count)))) as files:
        with hand_over(pair, files) as received:
            assert list(received.files) == list(files)
            for name, file in received.files.items():
                assert os.pread(file.fileno(), 100, 0).decode() == name
                assert os.path.samestat(os.fstat(file.fileno()), os.fstat(files[name].fileno()))
                assert not os.get_inheritable(file.fileno())
        assert not any(file.closed for file in files.values())


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_a_state_of_any_size_arrives_as_it_was(pair: Pair, size: int) -> None:
    state = os.urandom(size)
    with hand_over(pair, {}, state) as received:
        assert received.state == state


def test_names_may_have_any_characters(pair: Pair) -> None:
    names = [
        "\n",
        "\0",
        " ",
        "/dev/null",
        "../x",
        "é",
        "💾",
        "e\u0301",
        "a" * 255,
        '"',
        "{release}",
    ]
    with memfds(*names) as files, hand_over(pair, files) as received:
        assert list(received.files) == names


@pytest.mark.parametrize("name", ["", "a" * 256, "é" * 128, "\udcff"])
def test_a_name_that_cannot_go_is_refused_before_anything_goes(pair: Pair, name: str) -> None:
    with memfds("file") as files, pytest.raises(ValueError):  # noqa: PT011
        handoff.send(pair[0], {name: files["file"]})
    with memfds("file") as files, hand_over(pair, files) as received:
        assert list(received.files) == ["file"]


def test_one_descriptor_may_have_several_names(pair: Pair) -> None:
    with memfds("file") as files:
        one = files["file"]
        with hand_over(pair, {"a": one, "b": one.fileno(), "c": one}) as received:
            a, b, c = received.files.values()
            assert len({a.fileno(), b.fileno(), c.fileno(), one.fileno()}) == 4


def test_any_kind_of_file_can_be_handed_over(pair: Pair, tmp_path: Path) -> None:
    read, write = os.pipe()
    event = os.eventfd(7)
    folder = os.open(tmp_path, os.O_PATH)
    numbers = [read, write, event, folder, os.pidfd_open(os.getpid()), socket.socket().detach()]
    with ExitStack() as stack:
        files = {str(number): stack.enter_context(OwnedFd(number)) for number in numbers}
        with hand_over(pair, files) as received:
            os.write(received.files[str(write)].fileno(), b"through")
            assert os.read(read, 100) == b"through"
            assert os.eventfd_read(received.files[str(event)].fileno()) == 7


def test_a_descriptor_that_is_not_open_is_refused_before_anything_goes(pair: Pair) -> None:
    with pytest.raises(RequestError) as caught:
        handoff.send(pair[0], {"file": 999_999})
    assert caught.value.errno == errno.EBADF
    assert "descriptor 999999" in str(caught.value)
    with hand_over(pair, {}):
        pass


def test_a_connection_carries_one_handoff_after_the_other_and_is_left_as_it_was(
    pair: Pair,
) -> None:
    pair[0].settimeout(17)
    for state in (b"one", b"two"):
        with hand_over(pair, {}, state) as received:
            assert received.state == state
    assert [end.gettimeout() for end in pair] == [17, None]
    for end in pair:
        assert not end.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


def test_both_sides_learn_who_the_other_one_is(pair: Pair) -> None:
    ours, theirs = pair

    def successor() -> None:
        ours.close()
        with handoff.receive(theirs) as received:
            assert received.peer == Peer(os.getppid(), os.geteuid(), os.getegid())

    pid = run_in_child(successor)
    assert handoff.send(ours, {}) == Peer(pid, os.geteuid(), os.getegid())
    assert exited_cleanly(pid)


# What is done with it


def test_what_is_taken_stays_open_and_the_rest_is_closed(pair: Pair) -> None:
    with memfds("ram", "log") as files:
        with hand_over(pair, files) as received:
            ram = received.take("ram", Memfd)
            log = received.files["log"]
            assert list(received.files) == ["log"]
            with pytest.raises(KeyError):
                received.take("ram")
        with ram:
            assert type(ram) is Memfd
            assert ram.read(10, 0) == b"ram"
        assert log.closed
        received.close()


def test_what_is_not_of_the_type_asked_for_is_not_taken(pair: Pair) -> None:
    with OwnedFd(os.eventfd(0)) as event, hand_over(pair, {"event": event}) as received:
        with pytest.raises(RequestError) as caught:
            received.take("event", Memfd)
        assert caught.value.errno == errno.EINVAL
        with received.take("event") as taken:
            assert type(taken) is OwnedFd


# Sockets


def test_a_name_to_meet_under_is_for_one_user_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with handoff.listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with handoff.connect(path) as theirs:
            assert theirs.gettimeout() is None
            ours, _ = listener.accept()
            with ours, hand_over((ours, theirs), {}, b"state") as received:
                assert received.state == b"state"
    assert not path.exists()


def test_a_listener_does_not_wait_for_ever(tmp_path: Path) -> None:
    with handoff.listen(tmp_path / "socket", timeout=0.01) as listener:
        assert listener.gettimeout() == 0.01
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_name_that_nobody_listens_at_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HandoffError) as caught:
        handoff.connect(tmp_path / "socket")
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "file").touch()
    with pytest.raises(HandoffError) as caught:
        handoff.connect(tmp_path / "file")
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_listener_takes_nothing_elses_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(HandoffError) as caught, handoff.listen(path):
        pass
    assert caught.value.errno == errno.EADDRINUSE
    assert path.exists()


def leave_dead_path(path: Path) -> None:
    """Leave the path of a listener behind, as one that is killed does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
        dead.listen()


def test_the_path_of_a_listener_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    leave_dead_path(path)
    with handoff.listen(path) as listener, handoff.connect(path) as theirs:
        ours, _ = listener.accept()
        with ours, hand_over((ours, theirs), {}, b"state"):
            pass
    assert not path.exists()


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("listens", [True, False])
def test_a_listener_displaces_nobody_who_lives_and_does_not_disturb_it(
    tmp_path: Path, kind: socket.SocketKind, listens: bool
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as living:
        living.bind(str(path))
        if listens and kind is not socket.SOCK_DGRAM:
            living.listen(0)
        inode = path.stat().st_ino
        with pytest.raises(HandoffError) as caught, handoff.listen(path):
            pass
        assert caught.value.errno == errno.EADDRINUSE
        assert path.stat().st_ino == inode
        living.setblocking(False)
        if listens and kind is not socket.SOCK_DGRAM:
            with pytest.raises(BlockingIOError):
                living.accept()


def test_a_listener_removes_no_path_but_its_own(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with handoff.listen(path):
        path.unlink()
        path.write_text("of somebody else")
    assert path.read_text() == "of somebody else"
    path.unlink()
    with handoff.listen(path):
        path.unlink()
    assert not path.exists()


def test_listeners_that_begin_together_leave_one(tmp_path: Path) -> None:
    """Each of them finds the path of one that was killed, and all but one find a living one."""
    path = tmp_path / "socket"

    def listen(start: threading.Barrier, end: threading.Barrier) -> int:
        start.wait()
        try:
            with handoff.listen(path) as listener:
                end.wait()
                assert path.exists()
                with handoff.connect(path):
                    listener.accept()[0].close()
                return 0
        except HandoffError as error:
            end.wait()
            return error.errno or 0

    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            start, end = threading.Barrier(8), threading.Barrier(8)
            leave_dead_path(path)
            results = list(threads.map(listen, [start] * 8, [end] * 8))
            assert sorted(results) == [0] + [errno.EADDRINUSE] * 7
            assert not path.exists()


def test_a_listener_touches_no_path_while_another_one_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    leave_dead_path(path)
    monkeypatch.setattr("pyluo.handoff.over_socket.TIMEOUT", 0.05)
    with OwnedFd(os.open(tmp_path, os.O_RDONLY)) as folder:
        fcntl.flock(folder.fileno(), fcntl.LOCK_EX)
        inode = path.stat().st_ino
        with pytest.raises(HandoffError) as caught, handoff.listen(path):
            pass
        assert caught.value.errno == errno.EAGAIN
        assert path.stat().st_ino == inode


def test_an_error_in_the_block_of_a_listener_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), handoff.listen(tmp_path / "socket"):
        raise ZeroDivisionError
    with pytest.raises(InterruptedError) as caught, handoff.listen(tmp_path / "socket"):
        raise InterruptedError
    assert not isinstance(caught.value, RequestError)


def test_a_connection_does_not_wait_for_others_to_be_accepted(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with ExitStack() as stack, handoff.listen(path):
        for _ in range(2):  # a queue of one has room for two
            stack.enter_context(handoff.connect(path))
        with pytest.raises(HandoffError) as caught:
            handoff.connect(path)
    assert caught.value.errno == errno.EAGAIN


def test_a_path_that_no_socket_can_have_is_an_error() -> None:
    for use in (handoff.connect, lambda path: handoff.listen(path).__enter__()):
        with pytest.raises(HandoffError) as caught:
            use("/tmp/" + "a" * 103)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_socket_of_another_kind_is_refused() -> None:
    with ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        with pytest.raises(ValueError, match="SOCK_SEQPACKET"):
            handoff.send(ends[0], {})
        with pytest.raises(ValueError, match="SOCK_SEQPACKET"):
            handoff.receive(ends[1])


def test_a_socket_without_another_end_is_an_error() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone:
        with pytest.raises(HandoffError) as caught:
            handoff.receive(alone)
        assert caught.value.errno == errno.ENOTCONN


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_of_nothing_is_refused(pair: Pair, timeout: float) -> None:
    both: list[dict[str, Any]] = [{"timeout": timeout}, {"deadline": timeout}]
    for limits in both:
        with pytest.raises(ValueError, match="above zero"):
            handoff.receive(pair[0], **limits)
        with pytest.raises(ValueError, match="above zero"):
            handoff.send(pair[1], {}, **limits)
    with hand_over(pair, {}):  # because nothing was sent
        pass


# Who is at the other end


def test_the_caller_may_choose_the_process_that_it_hands_over_to(pair: Pair) -> None:
    ours, theirs = pair

    def successor() -> None:
        ours.close()
        with handoff.receive(theirs, allow=lambda peer: peer.pid == os.getppid()) as received:
            assert received.state == b"state"

    pid = run_in_child(successor)
    handoff.send(ours, {}, b"state", allow=lambda peer: peer.pid == pid)
    assert exited_cleanly(pid)


def test_a_process_that_the_caller_does_not_choose_gets_nothing(pair: Pair) -> None:
    sent, received = send_and_receive(*pair, {}, b"state", allow=lambda peer: False)
    assert isinstance(sent, HandoffError)
    assert isinstance(received, HandoffError)
    assert sent.errno == received.errno == errno.EPERM


# When it fails


def test_a_receiver_that_takes_less_refuses_with_the_same_reason_on_both_sides(
    pair: Pair,
) -> None:
    sent, received = send_and_receive(*pair, {}, b"state", max_state=4)
    for error in (sent, received):
        assert isinstance(error, HandoffError)
        assert error.errno == errno.E2BIG
        assert "5 bytes of state" in str(error)
        assert "max_state" in str(error)


def test_more_descriptors_than_the_receiver_takes_are_refused(pair: Pair) -> None:
    with memfds("a", "b") as files:
        sent, received = send_and_receive(*pair, files, max_files=1)
        assert isinstance(sent, HandoffError)
        assert isinstance(received, HandoffError)
        assert sent.errno == received.errno == errno.E2BIG


def test_a_silent_process_is_not_waited_for(pair: Pair) -> None:
    for call in (
        lambda: handoff.send(pair[0], {}, timeout=0.01),
        lambda: handoff.receive(pair[1], timeout=0.01),
    ):
        with pytest.raises(HandoffError) as caught:
            call()
        assert caught.value.errno in (errno.ETIMEDOUT, errno.ECONNRESET)
    with pytest.raises(HandoffError):  # because a failed conversation is not resumed
        handoff.receive(pair[1])


def test_an_error_of_the_caller_is_told_to_the_other_side(pair: Pair) -> None:
    def broken(peer: Peer) -> bool:
        raise RuntimeError("of the caller")

    with ThreadPoolExecutor(1) as sender:
        sending = sender.submit(handoff.send, pair[0], {})
        with pytest.raises(RuntimeError):
            handoff.receive(pair[1], allow=broken)
    sent = outcome(sending)
    assert isinstance(sent, HandoffError)
    assert sent.errno == errno.ECANCELED
    assert "RuntimeError: of the caller" in str(sent)


def test_a_refusal_does_not_wait_for_room_in_the_socket(pair: Pair) -> None:
    def late(*_: object) -> None:
        raise RuntimeError("it waits")

    ours, theirs = pair
    send_packet(theirs, READY)
    ours.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            ours.send(b"unheard")
    ours.setblocking(True)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        with pytest.raises(HandoffError) as caught:
            handoff.send(ours, {}, allow=lambda peer: False, timeout=None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert caught.value.errno == errno.EPERM


def test_a_reason_is_heard_though_the_other_side_has_hung_up_on_something_unheard(
    pair: Pair,
) -> None:
    ours, theirs = pair
    theirs.send(b"unheard")
    send_packets(ours, [(pack("REFUSED", errno.EPERM) + b"a reason", [])])
    ours.close()
    with pytest.raises(HandoffError, match="a reason") as caught:
        handoff.send(theirs, {})
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("packets", range(3))
def test_a_process_that_dies_in_the_middle_is_an_error_for_the_other(
    pair: Pair, recorded: Recorded, side: str, packets: int
) -> None:
    ours, theirs = pair

    def mortal() -> None:
        theirs.close()
        send_packets(ours, getattr(recorded, side)[:packets])

    pid = run_in_child(mortal)
    ours.close()
    assert exited_cleanly(pid)
    with pytest.raises(HandoffError) as caught:
        (recorded.receive if side == "sender" else recorded.send)(theirs)
    assert caught.value.errno in (errno.ECONNRESET, errno.EPIPE)
    if side == "sender" and packets:
        caught.value.unfinished.abandon()
    else:
        assert caught.value.unfinished is None


def test_a_receiver_that_gave_up_cannot_be_committed_to(pair: Pair, recorded: Recorded) -> None:
    ours, theirs = pair
    send_packets(ours, recorded.sender[:-1])
    with pytest.raises(HandoffError) as caught:
        handoff.receive(theirs, timeout=0.01)
    assert caught.value.errno == errno.ETIMEDOUT
    with pytest.raises(BrokenPipeError):
        send_packets(ours, recorded.sender[-1:])
    assert [kind for kind, _, _ in received_packets(ours)] == [
        "READY",
        "WANT",
        "COMPLETE",
        "REFUSED",
    ]


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 100])
def test_descriptors_that_do_not_fit_into_the_process_are_an_error_that_says_why(
    pair: Pair, room: int
) -> None:
    ours, theirs = pair
    with memfds(*map(str, range(150))) as files, recording(files, b"") as many:
        send_packets(ours, many.sender)
        with lower_limit(room), pytest.raises(HandoffError, match="RLIMIT_NOFILE") as caught:
            handoff.receive(theirs)
    assert caught.value.errno == errno.EMFILE
    if room:
        assert received_packets(ours)[-1] == ("REFUSED", errno.EMFILE, 0)
    else:
        assert received_packets(ours) == []  # nothing was begun


@contextmanager
def lower_limit(room: int) -> Iterator[None]:
    """Lower RLIMIT_NOFILE so that only `room` more descriptors can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_fds())
    with ExitStack() as gaps:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        with suppress(OSError):
            while True:
                gaps.enter_context(OwnedFd(os.dup(0)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


# A relay, which changes what goes through it


def relay(
    change: Change, files: Mapping[str, OwnedFd | int], state: bytes, timeout: float = 10.0
) -> tuple[Any, Any, int]:
    """Hand over through a relay; return either side's result or error, and the number of packets.

    Args:
        change: a function that gets the number, the bytes and the descriptors of a packet, and
            returns what to send instead; if it returns no bytes, the relay hangs up.
        files: the files to hand over.
        state: the state to hand over.
        timeout: how long either side waits.
    """
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        sender, near = new_pair(stack)
        far, receiver = new_pair(stack)

        def send() -> Peer:
            with sender:
                return handoff.send(sender, files, state, timeout=timeout)

        def receive() -> handoff.Handoff:
            with receiver:
                return handoff.receive(receiver, timeout=timeout)

        ends = threads.submit(send), threads.submit(receive)
        count = 0
        for packet, out in relayed_packets(near, far):
            with suppress(OSError):
                try:
                    data, fds = change(count, packet.data, packet.fds)
                    if not data:
                        break
                    send_packet(out, data, fds)
                finally:
                    packet.close()
            count += 1
        near.close()
        far.close()
        return outcome(ends[0]), outcome(ends[1]), count


def relayed_packets(
    near: socket.socket, far: socket.socket
) -> Iterator[tuple[Packet, socket.socket]]:
    """Yield each packet from either socket, with the other socket, until one hangs up."""
    while True:
        for end in select.select([near, far], [], [])[0]:
            packet = receive_packet(end)
            if not packet.data:
                return
            yield packet, far if end is near else near


def test_a_connection_cut_after_any_packet_leaves_one_owner_or_none_that_knows() -> None:
    """Nothing but death ends a connection between two pyluos in this way; both sides live here."""

    def until(last: int) -> Change:
        return lambda number, data, fds: (data if number < last else b"", fds)

    with memfds(*map(str, range(300))) as files:
        sent, received, packets = relay(until(100), files, b"state")
        assert isinstance(sent, Peer)
        with received:
            assert list(received.files) == list(files)
        assert packets == 9
        for last in range(packets):
            sent, received, _ = relay(until(last), files, b"state", timeout=1)
            assert isinstance(sent, HandoffError), last
            assert (sent.unfinished is not None) == (last >= 7)
            if sent.unfinished is not None:
                sent.unfinished.concede()
            if last == 8:
                received.close()
                continue
            assert isinstance(received, HandoffError), last
            assert (received.unfinished is not None) == (last >= 2)
            if received.unfinished is not None:
                with pytest.raises(HandoffError) as caught:
                    received.unfinished.take_over(timeout=0.01)
                assert caught.value.errno == (errno.ETIMEDOUT if last >= 6 else errno.ENODATA)
                received.unfinished.abandon()


# Conversations that were recorded, and changed since


@dataclass(frozen=True)
class Recorded:
    """The packets of a handoff, and what it handed over."""

    sender: list[Sent]
    receiver: list[Sent]
    files: Mapping[str, OwnedFd]
    state: bytes

    def send(self, end: socket.socket) -> None:
        # All packets are in the socket already, so that this is how long it waits for a death.
        handoff.send(end, self.files, self.state, timeout=0.01)

    def receive(self, end: socket.socket) -> None:
        """Receive the handoff, and check that exactly what was sent arrives."""
        with handoff.receive(end, timeout=5) as received:
            self.check(received)

    def check(self, received: handoff.Handoff) -> None:
        assert received.state == self.state
        assert list(received.files) == list(self.files)
        for name, file in received.files.items():
            assert os.path.samestat(os.fstat(file.fileno()), os.fstat(self.files[name].fileno()))

    def refusal_to_send(self, packets: Sequence[Sent]) -> HandoffError | None:
        """Return why the sender gives up on these packets; None if it hands over."""
        return find_refusal(self.send, packets, "COMMIT")

    def refusal_to_receive(self, packets: Sequence[Sent]) -> HandoffError | None:
        """Return why the receiver gives up on these packets; None if it accepts the handoff."""
        return find_refusal(self.receive, packets, "TAKEN")


def find_refusal(
    call: Callable[[socket.socket], None], packets: Sequence[Sent], last: str
) -> HandoffError | None:
    with ExitStack() as stack:
        ours, theirs = new_pair(stack)
        send_packets(ours, packets)
        ours.shutdown(socket.SHUT_WR)
        before = open_fds()
        error = None
        try:
            call(theirs)
        except HandoffError as caught:
            error = caught
        undecided = error is not None and error.unfinished is not None
        if error is not None and undecided:
            assert error.unfinished.owner is handoff.Owner.UNDECIDED
            if isinstance(error.unfinished, handoff.Sending):
                error.unfinished.concede()
            else:
                error.unfinished.abandon()
                undecided = False
            error.unfinished = None
        assert open_fds() == before
        assert undecided or error is None or error.errno != errno.ETIMEDOUT
        packets_sent = received_packets(ours)
        if error is None or "The other process gave up" not in str(error):  # which is not answered
            expected = "COMMIT" if undecided else last if error is None else "REFUSED"
            assert packets_sent[-1][0] == expected
        return error


@contextmanager
def recording(files: Mapping[str, OwnedFd], state: bytes) -> Iterator[Recorded]:
    record = Recorded([], [], files, state)
    with ExitStack() as stack:

        def note(number: int, data: bytes, fds: list[int]) -> Sent:
            if data:
                copies = [stack.enter_context(OwnedFd(os.dup(fd))).fileno() for fd in fds]
                (record.sender if number % 2 else record.receiver).append((data, copies))
            return data, fds

        sent, received, _ = relay(note, files, state)
        assert isinstance(sent, Peer), sent
        received.close()
        yield record


@pytest.fixture(scope="module")
def recorded() -> Iterator[Recorded]:
    with memfds("ram", "log", "event") as files, recording(files, b"a state") as record:
        yield record


READY = pack("READY")


def test_the_packets_are_those_of_the_protocol(recorded: Recorded) -> None:
    with ExitStack() as stack:
        conversation = []
        for packets in (recorded.receiver, recorded.sender):
            ours, theirs = new_pair(stack)
            send_packets(ours, packets)
            conversation.append(received_packets(theirs))
    assert conversation == [
        [("READY", 0, 0), ("WANT", 0, 0), ("COMPLETE", 3, 0), ("TAKEN", 3, 0)],
        [("OFFER", 3, 1), ("FILES", 0, 3), ("COMMIT", 3, 0)],
    ]


def test_what_was_recorded_is_taken(recorded: Recorded) -> None:
    assert recorded.refusal_to_receive(recorded.sender) is None
    assert recorded.refusal_to_send(recorded.receiver) is None


def test_a_packet_cut_at_any_byte_is_refused(recorded: Recorded) -> None:
    for refusal, packets in (
        (recorded.refusal_to_receive, recorded.sender),
        (recorded.refusal_to_send, recorded.receiver),
    ):
        for index, (data, fds) in enumerate(packets):
            for length in range(len(data)):
                cut = [*packets[:index], (data[:length], fds), *packets[index + 1 :]]
                assert refusal(cut), (index, length)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_packet_that_says_something_else_is_refused(
    recorded: Recorded, side: str, index: int
) -> None:
    packets = getattr(recorded, side)
    refusal = recorded.refusal_to_receive if side == "sender" else recorded.refusal_to_send
    data, fds = packets[index]
    magic, version, kind, number = struct.unpack("<8sHHI", data)
    changed = [
        *((magic, version, other, number) for other in range(10) if other not in (kind, 7)),
        *((magic, version, kind, (number + more) % (1 << 32)) for more in (-1, 1)),
        (magic[::-1], version, kind, number),
    ]
    malformed = [*(struct.pack("<8sHHI", *fields) for fields in changed), data + b"x", data + data]
    for each in [*malformed, data.ljust(5000)]:
        error = refusal([*packets[:index], (each, fds), *packets[index + 1 :]])
        assert error is not None, each
        assert error.errno == errno.EBADMSG


def test_a_reason_longer_than_any_is_none(pair: Pair) -> None:
    send_packets(pair[0], [(pack("REFUSED", errno.EPERM) + b"a" * 5000, [])])
    with pytest.raises(HandoffError, match="longer than any") as caught:
        handoff.receive(pair[1])
    assert caught.value.errno == errno.EBADMSG


def test_a_commit_after_nonsense_does_not_count(recorded: Recorded) -> None:
    offer, files, commit = recorded.sender
    assert recorded.refusal_to_receive([offer, files, (b"nonsense", []), commit])


@pytest.mark.parametrize("extra", [1, 250, 253])
@pytest.mark.parametrize("index", range(3))
def test_descriptors_that_were_not_announced_are_refused_and_closed(
    recorded: Recorded, index: int, extra: int
) -> None:
    data, fds = recorded.sender[index]
    more = (data, [*fds, *[0] * extra][:253])
    packets = [*recorded.sender[:index], more, *recorded.sender[index + 1 :]]
    assert recorded.refusal_to_receive(packets)
    if index < len(recorded.receiver):
        data, fds = recorded.receiver[index]
        more = (data, [0] * extra)
        packets = [*recorded.receiver[:index], more, *recorded.receiver[index + 1 :]]
        assert recorded.refusal_to_send(packets)


def test_descriptors_of_other_files_than_announced_are_refused(recorded: Recorded) -> None:
    offer, (data, fds), commit = recorded.sender
    for others in ([fds[1], fds[0], fds[2]], fds[:2], [*fds[:2], 0], []):
        assert recorded.refusal_to_receive([offer, (data, others), commit])


def test_another_version_is_told_from_nonsense(pair: Pair, recorded: Recorded) -> None:
    data, fds = recorded.sender[0]
    send_packets(pair[0], [(data[:8] + b"\x01" + data[9:], fds)])
    with pytest.raises(HandoffError, match="version 1") as caught:
        handoff.receive(pair[1])
    assert caught.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.parametrize(
    ("number", "reason", "expected", "shown"),
    [
        (errno.ENOMEM, b"no memory", errno.ENOMEM, "gave up: no memory"),
        (0, b"", errno.EPROTO, "gave up: "),
        (1 << 31, b"\xff\x1b[2J\n", errno.EPROTO, "gave up: �?[2J?"),
    ],
)
def test_the_reason_of_the_other_side_is_shown_whatever_it_is(
    pair: Pair, number: int, reason: bytes, expected: int, shown: str
) -> None:
    send_packet(pair[1], pack("REFUSED", number) + reason)
    with pytest.raises(HandoffError) as caught:
        handoff.send(pair[0], {})
    assert caught.value.errno == expected
    assert shown in str(caught.value)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 2), st.integers(0, 127)),
        st.tuples(st.just("cut"), st.integers(0, 2), st.integers(0, 15)),
        st.tuples(st.just("extend"), st.integers(0, 2), st.binary(min_size=1, max_size=1100)),
        st.tuples(st.just("drop"), st.integers(0, 2), st.none()),
        st.tuples(st.just("repeat"), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("insert"), st.integers(0, 2), st.binary(max_size=40)),
        st.tuples(st.just("attach"), st.integers(0, 2), st.integers(1, 253)),
        st.tuples(st.just("detach"), st.integers(0, 2), st.integers(0, 2)),
    ),
    min_size=1,
    max_size=3,
)


def apply_changes(packets: Sequence[Sent], changes: Sequence[tuple[str, int, Any]]) -> list[Sent]:
    result = list(packets)
    for what, at, how in changes:
        index = at % max(1, len(result))
        data, fds = result[index] if result else (b"", [])
        match what:
            case "flip" if data:
                bit = how % (8 * len(data))
                flipped = bytearray(data)
                flipped[bit // 8] ^= 1 << bit % 8
                result[index] = bytes(flipped), fds
            case "cut":
                result[index : index + 1] = [(data[:how], fds)]
            case "extend":
                result[index : index + 1] = [(data + how, fds)]
            case "drop":
                result[index : index + 1] = []
            case "repeat":
                result.insert(how, (data, fds))
            case "insert":
                result.insert(index, (how, [0] * (len(how) % 3)))
            case "attach":
                result[index : index + 1] = [(data, [*fds, *[0] * how][:253])]
            case "detach":
                result[index : index + 1] = [(data, fds[:how])]
    return result


@settings(deadline=None, max_examples=400)
@given(changes=CHANGES)
def test_a_changed_conversation_is_taken_as_it_was_or_refused(
    recorded: Recorded, changes: list[tuple[str, int, Any]]
) -> None:
    recorded.refusal_to_receive(apply_changes(recorded.sender, changes))
    recorded.refusal_to_send(apply_changes(recorded.receiver, changes))


@settings(deadline=None, max_examples=200)
@given(packets=st.lists(st.tuples(st.binary(max_size=1100), st.integers(0, 10)), max_size=4))
def test_any_bytes_with_any_descriptors_are_refused(
    recorded: Recorded, packets: list[tuple[bytes, int]]
) -> None:
    noise = [(data, [0] * fds) for data, fds in packets]
    assert recorded.refusal_to_receive(noise)
    assert recorded.refusal_to_send(noise)


# Manifests


def read_manifest(recorded: Recorded) -> bytes:
    (fd,) = recorded.sender[0][1]
    return os.pread(fd, 1 << 20, 0)


def with_digest(manifest: bytes) -> bytes:
    """Return the manifest with a valid digest, so that only its other damage counts."""
    digest = hashlib.sha256(manifest[:40] + bytes(32) + manifest[72:]).digest()
    return manifest[:40] + digest + manifest[72:]


def refusal_of_manifest(
    recorded: Recorded, manifest: bytes, seals: Seal = SEALS
) -> HandoffError | None:
    """Return why a receiver refuses the recorded packets with another manifest."""
    with Memfd.create("manifest", 0) as memfd:
        memfd.write(manifest, 0)
        memfd.seal(seals)
        offer = (recorded.sender[0][0], [memfd.fileno()])
        return recorded.refusal_to_receive([offer, *recorded.sender[1:]])


def test_a_manifest_cut_at_any_byte_is_refused(recorded: Recorded) -> None:
    whole = read_manifest(recorded)
    assert refusal_of_manifest(recorded, whole) is None
    for length in range(len(whole)):
        assert refusal_of_manifest(recorded, whole[:length])
        assert refusal_of_manifest(recorded, with_digest(whole[:length].ljust(72, b"\0")))


def test_a_manifest_with_something_after_it_is_refused(recorded: Recorded) -> None:
    whole = read_manifest(recorded)
    for more in (b"\0", bytes(5000)):
        assert refusal_of_manifest(recorded, whole + more)


def test_a_manifest_with_any_byte_changed_is_refused(recorded: Recorded) -> None:
    whole = read_manifest(recorded)
    for index, byte in enumerate(whole):
        assert refusal_of_manifest(recorded, whole[:index] + bytes([byte ^ 1]) + whole[index + 1 :])


@pytest.mark.parametrize("missing", list(Seal))
def test_a_manifest_that_somebody_could_change_is_refused(
    recorded: Recorded, missing: Seal
) -> None:
    error = refusal_of_manifest(recorded, read_manifest(recorded), SEALS & ~missing)
    assert (error is None) == (missing not in SEALS)


def test_a_manifest_that_would_block_is_not_read(recorded: Recorded) -> None:
    with ExitStack() as stack:
        for fd in (*os.pipe(), os.eventfd(0)):
            stack.enter_context(OwnedFd(fd))
            offer = (recorded.sender[0][0], [fd])
            assert recorded.refusal_to_receive([offer, *recorded.sender[1:]])


@pytest.mark.parametrize(
    ("names", "excess", "problem"),
    [
        ([b"ram", b"ram", b"log"], 0, "two descriptors are called 'ram'"),
        ([b"", b"log", b"event"], 0, "a name of 0 bytes"),
        ([b"\xff", b"log", b"event"], 0, "is not UTF-8"),
        ([b"a" * 256, b"log", b"event"], 0, "a name of 256 bytes"),
        ([b"ram", b"log"], 0, "a manifest of 2"),
        ([b"ram", b"log", b"event", b"more"], 0, "a manifest of 4"),
        ([b"ram", b"log", b"event"], -1, "a name of 5 bytes"),
        ([b"ram", b"log", b"event"], -30, "table is too short"),
        ([b"ram", b"log", b"event"], 1, "table is too long"),
        ([b"ram", b"log", b"event"], 900, "its table has"),
        ([b"ram", b"log", b"event"], 8, "is not that of its header"),
    ],
)
def test_a_manifest_of_nonsense_with_the_right_digest_is_refused(
    recorded: Recorded, names: list[bytes], excess: int, problem: str
) -> None:
    files = [os.fstat(fd) for fd in recorded.sender[1][1]]
    table = b"".join(
        struct.pack("<iQQIH", -1, status.st_dev, status.st_ino, stat.S_IFREG, len(name)) + name
        for name, status in zip(names, files + files, strict=False)
    )
    rest = (table + recorded.state).ljust(max(0, excess))
    sizes = len(table) + excess, len(recorded.state) - min(excess, len(recorded.state))
    header = HEADER.pack(b"pyluoHOM", 1, len(names), 0, *sizes, bytes(32))
    error = refusal_of_manifest(recorded, with_digest(header + rest))
    assert error is not None
    assert error.errno == errno.EBADMSG
    assert problem in str(error)


@pytest.mark.parametrize(("count", "state"), [((1 << 32) - 1, 7), (3, 1 << 62)])
def test_a_manifest_that_claims_more_than_the_limits_is_not_read(
    recorded: Recorded, count: int, state: int
) -> None:
    error = refusal_of_manifest(
        recorded, HEADER.pack(b"pyluoHOM", 1, count, 0, 0, state, bytes(32))
    )
    assert error is not None
    assert error.errno == errno.E2BIG


@settings(deadline=None, max_examples=300)
@given(
    edits=st.lists(
        st.tuples(st.integers(8, 200), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3
    )
)
def test_a_changed_manifest_with_the_right_digest_is_an_error_or_nothing_but_a_manifest(
    recorded: Recorded, edits: list[tuple[int, bytes]]
) -> None:
    """Somebody who writes a valid digest can choose the names and the state, but nothing else."""
    whole = bytearray(read_manifest(recorded))
    for offset, data in edits:
        whole[offset : offset + len(data)] = data
    with ExitStack() as stack:
        memfd = stack.enter_context(Memfd.create("manifest", 0))
        memfd.write(with_digest(bytes(whole)), 0)
        memfd.seal(SEALS)
        ours, theirs = new_pair(stack)
        send_packets(ours, [(recorded.sender[0][0], [memfd.fileno()]), *recorded.sender[1:]])
        ours.shutdown(socket.SHUT_WR)
        before = open_fds()
        with suppress(HandoffError), handoff.receive(theirs) as received:
            assert len(received.files) == len(recorded.files)
        assert open_fds() == before


def test_the_module_is_there_when_it_is_asked_for() -> None:
    assert pyluo.handoff is handoff
