"""Raw requests, without pyluo's checks. Imports only pyluo and the standard library."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyluo import IncomingSession, LiveUpdate, Memfd, OutgoingSession, RequestError
from pyluo.guest.faults import each_fails
from pyluo.liveupdate import _CREATE_SESSION as CREATE
from pyluo.liveupdate import _RETRIEVE_SESSION as RETRIEVE
from pyluo.session import _FINISH as FINISH
from pyluo.session import _GET_NAME as GET_NAME
from pyluo.session import _PRESERVE_FD as PRESERVE_FD
from pyluo.session import _RETRIEVE_FD as RETRIEVE_FD

if TYPE_CHECKING:
    from pyluo._sys import Ioctl

__all__ = ["CREATE", "FINISH", "GET_NAME", "PRESERVE_FD", "RETRIEVE", "RETRIEVE_FD"]

Answer = tuple[str, int | None]


def answer(request: Ioctl, fd_number: int, /, **fields: int | bytes) -> Answer:
    """Make a request; return the class and the errno of its exception, or ("", 0)."""
    try:
        request(fd_number, "", **fields)
    except RequestError as error:
        return type(error).__name__, error.errno
    return "", 0


def retrieve(name: str) -> IncomingSession:
    with LiveUpdate() as device:
        return device.retrieve_session(name)


def ask_incoming(name: str) -> dict[str, Answer]:
    """Return an incoming session's answers to requests, ordered so that none affects the next."""
    session = retrieve(name)
    fd = session.fileno()
    with Memfd.create("x", 4096) as memfd:
        answers = {
            "preserve": answer(PRESERVE_FD, fd, fd=memfd.fileno(), token=9),
            "unknown token": answer(RETRIEVE_FD, fd, fd=-1, token=99),
            "name": answer(GET_NAME, fd),
            "reserved": answer(FINISH, fd, reserved=1),
            "still there": answer(RETRIEVE_FD, fd, fd=-1, token=1),
            "finish": answer(FINISH, fd),
            "finish again": answer(FINISH, fd),
            "after the finish": answer(RETRIEVE_FD, fd, fd=-1, token=1),
        }
    os.close(session.detach())
    return answers


def retrieve_twice(name: str) -> list[Answer]:
    encoded = name.encode()
    with LiveUpdate() as device:
        fd = device.retrieve_session(name)
        answers = [answer(RETRIEVE, device.fileno(), fd=-1, name=encoded)]
        fd.finish()
        answers.append(answer(RETRIEVE, device.fileno(), fd=-1, name=encoded))
    return answers


def refusals_in_words(name: str) -> tuple[str, str]:
    """Return the messages for an unknown token, and for a session mistaken for an outgoing one."""
    session = retrieve(name)
    try:
        session.retrieve(99)
    except RequestError as error:
        unknown = str(error)
    mistaken = OutgoingSession.from_fd(os.dup(session.fileno()), trusted=True)
    try:
        with Memfd.create("x", 4096) as memfd:
            mistaken.preserve(memfd, 1)
    except RequestError as error:
        wrong = f"{type(error).__name__}: {error}"
    os.close(mistaken.detach())
    session.finish()
    return unknown, wrong


def send_unknown_tails(name: str) -> tuple[int, int, bool]:
    """Return the errnos for an unknown tail in both directions, and whether all files are kept."""
    incoming = retrieve(name)
    with LiveUpdate() as device, Memfd.create("x", 4096) as memfd:
        outgoing = device.create_session("tails")
        outgoing.preserve(memfd, 1)
        errnos = (
            RETRIEVE_FD.errno_for_unknown_tail(incoming.fileno()),
            RETRIEVE_FD.errno_for_unknown_tail(outgoing.fileno()),
        )
        with incoming.retrieve(1, Memfd) as kept:
            intact = kept.size == 4096
        try:
            memfd.resize(8192)
            intact = False
        except RequestError:
            outgoing.discard()
    incoming.finish()
    return *errnos, intact


def preserve_named(names: list[str]) -> list[OutgoingSession]:
    sessions = []
    with LiveUpdate() as device:
        for name in names:
            sessions.append(device.create_session(name))
            with Memfd.create("ram", 4096) as memfd:
                memfd.write(name.encode(), 0)
                sessions[-1].preserve(memfd, 1)
    return sessions


def open_with_a_fault() -> list[Answer]:
    """Return the answers to two opens of the device, the first of which runs out of memory."""
    for fault in each_fails():
        with fault:
            first = _open_device()
        if first[0] != "LuoError":  # that is ENOMEM, before anything was read
            break
    return [first, _open_device()]


def _open_device() -> Answer:
    try:
        LiveUpdate().close()
    except RequestError as error:
        return type(error).__name__, error.errno
    return "", 0


def retrieve_with_a_fault(name: str) -> list[Answer]:
    """Return the answers to retrieving a file: with a fault, and twice without one."""
    session = retrieve(name)
    answers: list[Answer] = []
    for fault in each_fails():
        with fault:
            under_fault = answer(RETRIEVE_FD, session.fileno(), fd=-1, token=1)
        after = answer(RETRIEVE_FD, session.fileno(), fd=-1, token=1)
        if after != ("", 0):
            again = answer(RETRIEVE_FD, session.fileno(), fd=-1, token=1)
            answers = [under_fault, after, again]
            break
    session.finish()
    return answers
