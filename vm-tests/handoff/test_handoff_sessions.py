"""Sessions that are handed over, whose last descriptor nobody may close by accident."""

from __future__ import annotations

import gc
import os
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyluo import LiveUpdate, Memfd, OutgoingSession, SessionExistsError, handoff

pytestmark = pytest.mark.in_guest


def hand_over_session(name: str) -> handoff.Handoff:
    """Hand a session and its file over within this process, which keeps no other descriptor."""
    with LiveUpdate() as device, Memfd.create("ram", 4096) as ram:
        session = device.create_session(name)
        session.preserve(ram, 1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, ThreadPoolExecutor(1) as thread:
            sending = thread.submit(handoff.send, ours, {"session": session, "ram": ram})
            received = handoff.receive(theirs)
            sending.result()
        session.discard()
    return received


def exists(name: str) -> bool:
    with LiveUpdate() as device:
        try:
            device.create_session(name).discard()
        except SessionExistsError:
            return True
        return False


def discard(number: int) -> None:
    OutgoingSession.from_fd(number).discard()


def test_a_session_that_nobody_took_is_not_closed() -> None:
    received = hand_over_session("untaken")
    number = received.files["session"].fileno()
    with pytest.warns(ResourceWarning, match="not taken.*'session'"), received:
        pass
    assert list(received.files) == ["session"]
    assert exists("untaken")
    session = received.take("session", OutgoingSession)
    assert session.fileno() == number
    assert session.has(1)
    session.discard()
    received.close()
    assert not exists("untaken")


def test_a_session_in_a_dropped_handoff_is_not_closed() -> None:
    received = hand_over_session("dropped")
    number = received.files["session"].fileno()
    received.take("ram").close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del received
        gc.collect()
    assert exists("dropped")
    discard(number)


def test_an_exception_closes_nothing_that_was_handed_over() -> None:
    received = hand_over_session("exception")
    with pytest.raises(ZeroDivisionError), received:
        raise ZeroDivisionError
    assert list(received.files) == ["session", "ram"]
    received.take("session", OutgoingSession).discard()
    received.close()


def test_a_session_that_came_through_exec_is_not_closed() -> None:
    program = (
        "import os, sys; from pyluo import handoff; received = handoff.inherited(); "
        "number = received.files['session'].fileno(); received.close(); del received; "
        "print(os.readlink(f'/proc/self/fd/{number}'))"
    )
    with LiveUpdate() as device:
        session = device.create_session("exec")
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.dup2(writer, 1)
            handoff.exec_with(
                [sys.executable, "-W", "ignore", "-c", program],
                {"session": session},
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as output:
        assert output.read() == "anon_inode:[luo_session] exec\n"
    assert os.waitpid(pid, 0)[1] == 0
    session.discard()
