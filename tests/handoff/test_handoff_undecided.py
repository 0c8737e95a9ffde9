"""What each side can do when the other one is gone, or silent, and the files have no known owner.

test_handoff_deaths.py kills either side at each line; here are the cases that need one moment.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import pickle
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pyluo import HandoffError, Memfd, handoff
from pyluo.handoff import Owner, Receiving, Sending

from .packets import pack, receive_packet, received_packets, send_packet, send_packets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.handoff.packets import Outgoing

    Pair = tuple[socket.socket, socket.socket]

CONTENTS = os.urandom(1 << 16)
NO_SUCH_OPTION = 9999  # of a socket: the kernel answers as one that does not know SO_PASSPIDFD


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=["pidfd of the packet", "pidfd by PID"])
def _way_to_a_pidfd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pidfd by PID":
        monkeypatch.setattr("pyluo.handoff.conversation._SO_PASSPIDFD", NO_SUCH_OPTION)


@contextmanager
def process(function: Callable[[], object]) -> Iterator[int]:
    """Run a function in another process, which is killed at the end of the block."""
    pid = os.fork()
    if not pid:
        try:
            function()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def make_ram() -> Memfd:
    ram = Memfd.create("ram", 0)
    ram.write(CONTENTS, 0)
    return ram


class Breaking(Sending):
    """A sender that does something right after it has sent a packet of some kind."""

    def break_after(self, kind: str, action: Callable[[], object]) -> None:
        self.kind, self.action = kind, action
        self.send()

    def _send(self, packet: Outgoing) -> bool:
        was_sent = super()._send(packet)
        if packet.kind.name == self.kind:
            self.action()
        return was_sent


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def sender(pair: Pair, kind: str, action: Callable[[], object], count: int = 1) -> Iterator[int]:
    """Run a sender that breaks; the test has the other end."""
    ours, theirs = pair

    def send() -> None:
        theirs.close()
        ram = make_ram()
        files = {f"ram {number}": ram for number in range(count)}
        Breaking(ours, files, b"state").break_after(kind, action)

    with process(send) as pid:
        ours.close()
        yield pid


def fail_to_receive(theirs: socket.socket, **limits: float) -> Receiving:
    receiving = Receiving(theirs)
    with pytest.raises(HandoffError) as caught:
        receiving.receive(**limits)
    assert caught.value.unfinished is receiving
    caught.value.unfinished = None
    assert receiving.owner is Owner.UNDECIDED
    return receiving  # type: ignore[no-any-return]  # mypy narrows it to Any


@pytest.mark.usefixtures("_way_to_a_pidfd")
def test_what_a_dead_sender_has_sent_can_be_taken_over(pair: Pair) -> None:
    with sender(pair, "FILES", die):
        receiving = fail_to_receive(pair[1])
        with receiving.take_over() as received:
            assert receiving.owner is Owner.RECEIVER
            assert received.state == b"state"
            with received.take("ram 0", Memfd) as ram:
                assert ram.read(1 << 20, 0) == CONTENTS


def test_what_a_dead_sender_has_sent_can_be_taken_over_in_an_event_loop(pair: Pair) -> None:
    async def receive() -> handoff.Handoff:
        receiving = Receiving(pair[1])
        with pytest.raises(HandoffError) as caught:
            await receiving.receive_async()
        assert caught.value.unfinished is receiving
        caught.value.unfinished = None
        return await receiving.take_over_async()  # type: ignore[no-any-return]

    with sender(pair, "FILES", die), asyncio.run(receive()) as received:
        assert os.pread(received.files["ram 0"].fileno(), 1 << 20, 0) == CONTENTS


def test_the_death_is_seen_although_a_child_of_the_sender_has_the_socket(pair: Pair) -> None:
    reader, writer = os.pipe()

    def leave_a_child() -> None:
        if os.fork():
            die()
        os.close(writer)
        signal.alarm(20)
        os.read(reader, 1)
        os._exit(0)

    with sender(pair, "FILES", leave_a_child):
        os.close(reader)
        receiving = fail_to_receive(pair[1])
        with receiving.take_over(timeout=0.001):
            pass
        os.close(writer)  # the child ends


def test_nothing_is_taken_over_from_a_sender_that_lives(pair: Pair) -> None:
    def close_and_live() -> None:
        os.closerange(3, 100)
        signal.pause()

    with sender(pair, "FILES", close_and_live) as pid:
        receiving = fail_to_receive(pair[1])
        for _ in range(2):
            with pytest.raises(HandoffError) as caught:
                receiving.take_over(timeout=0.01)
            assert caught.value.errno == errno.ETIMEDOUT
            assert "lives" in str(caught.value)
            assert caught.value.unfinished is receiving
            assert receiving.owner is Owner.UNDECIDED
        caught.value.unfinished = None
        os.kill(pid, signal.SIGKILL)
        with receiving.take_over():
            pass


@pytest.mark.usefixtures("_way_to_a_pidfd")
def test_a_sender_that_has_said_that_it_keeps_the_files_keeps_them_when_it_is_dead(
    pair: Pair,
) -> None:
    def refuse_and_die() -> None:
        send_packet(socket.socket(fileno=os.dup(pair[0].fileno())), pack("REFUSED", errno.EIO))
        die()

    with sender(pair, "FILES", refuse_and_die) as pid:
        receiving = Receiving(pair[1])
        with pytest.raises(HandoffError, match="gave up") as caught:
            receiving.receive()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(HandoffError, match="gave up"):
            receiving.take_over()
        assert caught.value.unfinished is None
        assert receiving.owner is Owner.SENDER


def test_a_death_that_a_pid_cannot_prove_proves_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PID may be another process's by the time that a pidfd is opened by it."""
    monkeypatch.setattr("pyluo.handoff.conversation._SO_PASSPIDFD", NO_SUCH_OPTION)

    def wait_and_die() -> None:
        receive_packet(socket.socket(fileno=os.dup(pair[0].fileno())))
        die()

    with sender(pair, "OFFER", wait_and_die, count=0):
        receiving = fail_to_receive(pair[1])
        with pytest.raises(HandoffError) as caught:
            receiving.take_over()
        assert caught.value.errno == errno.EOPNOTSUPP
        caught.value.unfinished = None
        receiving.abandon()


def test_a_part_is_taken_over_only_if_it_is_asked_for(pair: Pair) -> None:
    with sender(pair, "FILES", die, count=300):
        receiving = fail_to_receive(pair[1])
        assert len(receiving.missing) == 47
        with pytest.raises(HandoffError, match="'ram 253'") as caught:
            receiving.take_over()
        assert caught.value.errno == errno.ENODATA
        caught.value.unfinished = None
        with receiving.take_over(partial=True) as received:
            assert len(received.files) == 253
            assert received.missing == tuple(f"ram {number}" for number in range(253, 300))


def test_a_dropped_handoff_of_a_dead_sender_stays_open(pair: Pair) -> None:
    with sender(pair, "FILES", die) as pid:
        receiving = fail_to_receive(pair[1])
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        (file,) = receiving._machine._state.files
        number = file.fileno()
        del file
        del receiving
        with pytest.warns(ResourceWarning, match="dropped before"):
            gc.collect()  # the traceback of the exception refers to it
        assert os.pread(number, 1 << 20, 0) == CONTENTS
        os.close(number)


def test_no_order_of_finalizers_loses_the_files_of_a_dead_sender(pair: Pair) -> None:
    with sender(pair, "FILES", die) as pid:
        receiving = fail_to_receive(pair[1])
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        (file,) = receiving._machine._state.files
        number = file.fileno()
        with pytest.warns(ResourceWarning, match="dropped before the handoff was decided"):
            file.__del__()  # as the garbage collector may do first
        assert os.pread(number, 1 << 20, 0) == CONTENTS
        taken = receiving.take_over(partial=True)  # nothing is dropped yet
        assert not file.undecided
        taken.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_a_dropped_handoff_is_left_to_a_sender_that_lives(pair: Pair) -> None:
    ours, theirs = pair
    receiving = Receiving(theirs)
    with pytest.raises(HandoffError):
        receiving.receive(timeout=0.01)
    del receiving
    gc.collect()
    assert received_packets(ours)[-1][0] == "REFUSED"


def test_an_exception_with_an_unfinished_handoff_can_be_pickled(pair: Pair) -> None:
    with sender(pair, "FILES", die):
        receiving = Receiving(pair[1])
        with pytest.raises(HandoffError) as caught:
            receiving.receive()
        copy = pickle.loads(pickle.dumps(caught.value))
        assert copy.unfinished is None
        assert copy.errno == errno.ECONNRESET
        caught.value.unfinished = None
        receiving.take_over().close()


def test_only_the_process_that_began_may_go_on(pair: Pair) -> None:
    receiving = Receiving(pair[1])
    pid = os.fork()
    if not pid:
        try:
            receiving.receive(timeout=1)
        except HandoffError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EDEADLK
    receiving.abandon()


# A receiver that has not said whether it took them


def receive_until_commit(theirs: socket.socket) -> None:
    send_packets(theirs, [(pack("READY"), []), (pack("WANT"), []), (pack("COMPLETE", 1), [])])


def test_a_sender_waits_for_an_answer_as_often_as_it_is_asked_to(pair: Pair) -> None:
    ours, theirs = pair
    receive_until_commit(theirs)
    with make_ram() as ram:
        sending = Sending(ours, {"ram": ram})
        with pytest.raises(HandoffError, match="has not said") as caught:
            sending.send(timeout=0.01)
        assert caught.value.errno == errno.ETIMEDOUT
        assert caught.value.unfinished is sending
        caught.value.unfinished = None
        assert sending.owner is Owner.UNDECIDED
        with pytest.raises(HandoffError):
            sending.take_back(timeout=0.01)
        with pytest.raises(HandoffError):
            sending.abandon()
        assert sending.owner is Owner.UNDECIDED
        send_packet(theirs, pack("TAKEN", 1))
        assert sending.send().pid == os.getpid()
        assert sending.owner.value == "receiver"
        with pytest.raises(HandoffError) as caught:
            sending.take_back()
        assert caught.value.errno == errno.EBUSY
    gc.collect()


class Interrupted(BaseException):
    """What a signal handler raises."""


class InterruptedByItsCommit(Sending):
    """A sender that is interrupted right after the system call that sends COMMIT."""

    def _put(self, packet: Outgoing) -> int:
        result = super()._put(packet)
        if packet.kind.name == "COMMIT":
            raise Interrupted
        return result


@pytest.mark.parametrize("again", ["abandon", "take_back", "send"])
def test_a_commit_that_was_sent_counts_although_an_exception_came_at_once(
    pair: Pair, again: str
) -> None:
    def refuse(_peer: handoff.Peer) -> bool:
        return allowed

    allowed = True
    receive_until_commit(pair[1])
    with make_ram() as ram:
        sending = InterruptedByItsCommit(pair[0], {"ram": ram}, allow=refuse)
        with pytest.raises(Interrupted):
            sending.send()
        allowed = False  # so that the sender has a reason to give up when it goes on
        with pytest.raises(HandoffError, match="has not said") as caught:
            getattr(sending, again)(**({} if again == "abandon" else {"timeout": 0.01}))
        caught.value.unfinished = None
        assert sending.owner is Owner.UNDECIDED
        assert [kind for kind, _, _ in received_packets(pair[1])] == ["OFFER", "FILES", "COMMIT"]
        sending.concede()


def test_a_sender_can_leave_the_files_to_a_silent_receiver(pair: Pair) -> None:
    receive_until_commit(pair[1])
    with make_ram() as ram:
        sending = Sending(pair[0], {"ram": ram})
        with pytest.raises(HandoffError) as caught:
            sending.send(timeout=0.01)
        caught.value.unfinished = None
        sending.concede()
        assert sending.owner is Owner.RECEIVER


@pytest.mark.usefixtures("_way_to_a_pidfd")
def test_a_sender_takes_the_files_back_from_a_silent_receiver_once_it_is_dead(pair: Pair) -> None:
    ours, theirs = pair

    def receive() -> None:
        ours.close()
        for packet in ("READY", "WANT", "COMPLETE"):
            send_packet(theirs, pack(packet, 1 if packet == "COMPLETE" else 0))
        signal.pause()

    with process(receive) as pid, make_ram() as ram:
        theirs.close()
        sending = Sending(ours, {"ram": ram})
        with pytest.raises(HandoffError) as caught:
            sending.send(timeout=0.1)
        caught.value.unfinished = None
        os.kill(pid, signal.SIGKILL)
        sending.take_back()
        assert sending.owner is Owner.SENDER


def test_a_receiver_that_says_no_after_the_commit_leaves_the_files_to_the_sender(
    pair: Pair,
) -> None:
    receive_until_commit(pair[1])
    send_packet(pair[1], pack("REFUSED", errno.EINTR) + b"interrupted")
    with make_ram() as ram:
        sending = Sending(pair[0], {"ram": ram})
        with pytest.raises(HandoffError, match="gave up: interrupted"):
            sending.send()
        assert sending.owner is Owner.SENDER


def test_a_commit_that_nobody_can_get_gives_nothing_up(pair: Pair) -> None:
    receive_until_commit(pair[1])
    pair[1].close()
    with make_ram() as ram:
        sending = Sending(pair[0], {"ram": ram})
        with pytest.raises(HandoffError) as caught:
            sending.send()
        assert caught.value.unfinished is None
        assert sending.owner is Owner.SENDER


def test_a_receiver_has_the_files_although_the_sender_died_after_its_commit(pair: Pair) -> None:
    with sender(pair, "COMMIT", die), handoff.receive(pair[1]) as received:
        assert list(received.files) == ["ram 0"]


# Time


@pytest.mark.parametrize("call", ["send", "receive"])
def test_a_deadline_holds_for_the_handoff_as_a_whole(pair: Pair, call: str) -> None:
    conversation = Sending(pair[0], {}) if call == "send" else Receiving(pair[1])
    with pytest.raises(HandoffError, match=r"as a whole took longer than 0\.01 seconds"):
        getattr(conversation, call)(timeout=None, deadline=0.01)


def test_a_deadline_counts_although_packets_come(pair: Pair) -> None:
    ours, theirs = pair

    def answer_slowly() -> None:
        ours.close()
        send_packet(theirs, pack("READY"))
        for number in range(0, 253 * 40, 253):
            signal.sigtimedwait([], 0.02)
            send_packet(theirs, pack("WANT", number))

    with make_ram() as ram, process(answer_slowly):
        theirs.close()
        files = {str(number): ram for number in range(253 * 40)}
        with pytest.raises(HandoffError, match="as a whole"):
            handoff.send(ours, files, timeout=5, deadline=0.2)


def test_a_cancelled_task_tells_the_other_side(pair: Pair) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(handoff.receive_async(pair[1], timeout=None))
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, receive_packet, pair[0])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    with pytest.raises(HandoffError, match="CancelledError"):
        handoff.send(pair[0], {})


def test_both_drivers_talk_to_each_other_and_leave_the_event_loop_running(pair: Pair) -> None:
    async def hand_over() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        blocking = asyncio.to_thread(handoff.receive, pair[1])
        with make_ram() as ram:
            files = {str(number): ram for number in range(600)}
            _, received = await asyncio.gather(handoff.send_async(pair[0], files), blocking)
        received.close()
        ticking.cancel()
        return ticks

    assert asyncio.run(hand_over()) > 0
