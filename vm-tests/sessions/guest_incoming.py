"""What the tests of incoming sessions run in the guest, before the jump and after it."""

from __future__ import annotations

import gc
import os
import warnings
from contextlib import suppress

from pyluo import (
    AlreadyPreservedError,
    IncomingSession,
    LiveUpdate,
    Memfd,
    OutgoingSession,
    OwnedFd,
    SessionNotFoundError,
    SessionRetrievedError,
    TokenNotFoundError,
    WrongSessionError,
    session_from_fd,
)
from sessions import guest_files
from sessions.guest_requests import retrieve


def preserve_all(names: list[str]) -> list[OutgoingSession]:
    sessions = []
    with LiveUpdate() as device:
        for name in names:
            session = device.create_session(name)
            with Memfd.create("ram", 4096) as ram:
                ram.write(guest_files.pattern(4096), 0)
                session.preserve(ram, 1)
            sessions.append(session)
    return sessions


def retrieve_a_session_twice(name: str) -> bool:
    session = retrieve(name)
    try:
        retrieve(name)
    except SessionRetrievedError:
        return True
    finally:
        session.finish()
    return False


def retrieve_a_token_twice(name: str) -> tuple[int, bool]:
    """The position that the second descriptor sees, and whether both are close-on-exec."""
    with retrieve(name) as session:
        one, other = session.retrieve(1, Memfd), session.retrieve(1)
    with one, other:
        os.lseek(one.fileno(), 123, os.SEEK_SET)
        inheritable = os.get_inheritable(one.fileno()) or os.get_inheritable(other.fileno())
        return os.lseek(other.fileno(), 0, os.SEEK_CUR), not inheritable


def leave_by_an_exception(name: str) -> bool:
    """Whether the file can still be had after an exception left the `with` block."""
    session = retrieve(name)
    try:
        with session:
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with session, session.retrieve(1, Memfd) as ram:
        return ram.read(4096, 0) == guest_files.pattern(4096)


def finish_without_retrieving(name: str) -> tuple[bool, bool]:
    """Whether a second finish is quiet, and whether the session is gone then."""
    session = retrieve(name)
    session.finish()
    session.finish()
    try:
        retrieve(name)
    except SessionNotFoundError:
        return session.closed, True
    return session.closed, False


def close_the_last_descriptor(name: str) -> bool:
    """Whether closing a detached descriptor took the session away."""
    os.close(retrieve(name).detach())
    try:
        retrieve(name)
    except SessionNotFoundError:
        return True
    return False


def preserve_again(name: str) -> tuple[bool, bool]:
    """Whether that was refused before the finish, and whether it worked after it."""
    incoming = retrieve(name)
    refused = False
    with incoming.retrieve(1, Memfd) as ram, LiveUpdate() as device:
        outgoing = device.create_session(name)
        try:
            outgoing.preserve(ram, 1)
        except AlreadyPreservedError as error:
            refused = "a memfd" in str(error)  # though its link no longer says so
        incoming.finish()
        outgoing.preserve(ram, 1)
        outgoing.discard()
    return refused, True


def adopt(name: str) -> tuple[str, bool, bool]:
    """The adopted session's name; whether it was refused as outgoing; whether it still works."""
    fd = retrieve(name).detach()
    try:
        OutgoingSession.from_fd(fd)
        refused = False
    except WrongSessionError:
        refused = True
    session = IncomingSession.from_fd(fd)
    with session, session.retrieve(1, Memfd) as ram:
        return session.name, refused, ram.size == 4096


def retrieve_what_is_not_there(name: str) -> tuple[bool, bool]:
    """Whether an unknown token was told as such, and whether the session survived that."""
    with retrieve(name) as session:
        try:
            session.retrieve(2)
            told = False
        except TokenNotFoundError:
            told = True
        with session.retrieve(1, Memfd) as ram:
            return told, ram.size == 4096


class PickyFd(OwnedFd):
    """A kind of file that no descriptor is."""

    @classmethod
    def from_fd(cls, fd: int) -> PickyFd:
        raise ValueError("not that kind")


def retrieve_as_the_wrong_kind(name: str) -> tuple[int, bool]:
    """How many descriptors that cost, and whether the file can be had as the right kind."""
    with retrieve(name) as session:
        before = len(os.listdir("/proc/self/fd"))
        with suppress(ValueError):
            session.retrieve(1, PickyFd)
        cost = len(os.listdir("/proc/self/fd")) - before
        with session.retrieve(1, Memfd) as ram:
            return cost, ram.size == 4096


def drop_without_a_word(name: str) -> tuple[bool, bool]:
    """Whether dropping the object warned, and whether the descriptor stayed open."""
    session = retrieve(name)
    fd = session.fileno()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del session
        gc.collect()
    warned = [warning.category for warning in caught] == [ResourceWarning]
    with IncomingSession.from_fd(fd) as again, again.retrieve(1, Memfd) as ram:
        return warned, ram.size == 4096


def adopt_either(name: str) -> list[str]:
    """The types that a session of each direction is adopted as."""
    incoming = retrieve(name)
    with LiveUpdate() as device:
        outgoing = device.create_session(name)
    adopted = [session_from_fd(incoming.detach()), session_from_fd(outgoing.detach())]
    kinds = [type(session).__name__ for session in adopted]
    trusted = IncomingSession.from_fd(adopted[0].detach(), trusted=True)
    kinds.append(trusted.name)
    trusted.finish()
    OutgoingSession.from_fd(adopted[1].detach(), trusted=True).discard()
    return kinds


def retrieve_from_many_threads(name: str) -> tuple[int, int, bool]:
    """How many of 64 retrievals came before the finish, how many after it; all told apart."""
    from concurrent.futures import ThreadPoolExecutor

    session = retrieve(name)

    def attempt(number: int) -> str:
        if number == 40:
            session.finish()
        try:
            session.retrieve(1).close()
        except ValueError:
            return "closed"
        except TokenNotFoundError:
            return "finished"
        return "retrieved"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(64)))
    return outcomes.count("retrieved"), outcomes.count("closed"), session.closed
