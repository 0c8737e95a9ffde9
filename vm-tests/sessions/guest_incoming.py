"""The guest's part of the tests of incoming sessions, before and after the jump."""

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
    RequestError,
    SessionNotFoundError,
    SessionRetrievedError,
    TokenNotFoundError,
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
    """Return the position of the second descriptor, and whether both have close-on-exec set."""
    session = retrieve(name)
    one, other = session.retrieve(1, Memfd), session.retrieve(1)
    session.finish()
    with one, other:
        os.lseek(one.fileno(), 123, os.SEEK_SET)
        inheritable = os.get_inheritable(one.fileno()) or os.get_inheritable(other.fileno())
        return os.lseek(other.fileno(), 0, os.SEEK_CUR), not inheritable


def lose_by_an_exception(name: str) -> bool:
    """Return whether a session whose only object an exception has taken can be retrieved again."""

    def fail() -> None:
        session = retrieve(name)
        session.retrieve(1).close()
        raise ZeroDivisionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ZeroDivisionError):
            fail()
        gc.collect()
    session = retrieve(name)
    with session.retrieve(1, Memfd) as ram:
        session.finish()
        return ram.read(4096, 0) == guest_files.pattern(4096)


def finish_without_retrieving(name: str) -> tuple[bool, bool]:
    """Finish a session twice; return whether the object is closed, and the session is gone."""
    session = retrieve(name)
    session.finish()
    session.finish()
    try:
        retrieve(name)
    except SessionNotFoundError:
        return session.closed, True
    return session.closed, False


def close_the_last_descriptor(name: str) -> bool:
    """Return whether closing a detached descriptor ended the session."""
    os.close(retrieve(name).detach())
    try:
        retrieve(name)
    except SessionNotFoundError:
        return True
    return False


def preserve_again(name: str) -> tuple[bool, bool]:
    """Return whether it was refused before the finish, and whether it worked afterwards."""
    incoming = retrieve(name)
    refused = False
    with incoming.retrieve(1, Memfd) as ram, LiveUpdate() as device:
        outgoing = device.create_session(name)
        try:
            outgoing.preserve(ram, 1)
        except AlreadyPreservedError as error:
            refused = "a memfd" in str(error)  # although its link no longer says so
        incoming.finish()
        outgoing.preserve(ram, 1)
        outgoing.discard()
    return refused, True


def adopt(name: str) -> tuple[str, bool, bool]:
    """Return the adopted session's name, whether it was refused as outgoing, and if it works."""
    fd = retrieve(name).detach()
    try:
        OutgoingSession.from_fd(fd)
        refused = False
    except RequestError:
        refused = True
    session = IncomingSession.from_fd(fd)
    with session.retrieve(1, Memfd) as ram:
        session.finish()
        return session.name, refused, ram.size == 4096


def retrieve_an_unknown_token(name: str) -> tuple[bool, bool]:
    """Return whether the token was reported as unknown, and whether the session still works."""
    session = retrieve(name)
    try:
        session.retrieve(2)
        reported = False
    except TokenNotFoundError:
        reported = True
    with session.retrieve(1, Memfd) as ram:
        session.finish()
        return reported, ram.size == 4096


class PickyFd(OwnedFd):
    """A class that accepts no descriptor."""

    @classmethod
    def from_fd(cls, fd: int) -> PickyFd:
        raise ValueError("not that kind")


def retrieve_as_the_wrong_kind(name: str) -> tuple[int, bool]:
    """Return the number of leaked descriptors, and whether the right class can be retrieved."""
    session = retrieve(name)
    before = len(os.listdir("/proc/self/fd"))
    with suppress(ValueError):
        session.retrieve(1, PickyFd)
    leaked = len(os.listdir("/proc/self/fd")) - before
    with session.retrieve(1, Memfd) as ram:
        session.finish()
        return leaked, ram.size == 4096


def drop_unfinished(name: str) -> tuple[bool, bool]:
    """Return whether dropping the object warned, and whether its descriptor is returned again."""
    session = retrieve(name)
    fd = session.fileno()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del session
        gc.collect()
    warned = [warning.category for warning in caught] == [ResourceWarning]
    session = retrieve(name)
    with session.retrieve(1, Memfd) as ram:
        stayed_open = session.fileno() == fd and ram.size == 4096
    session.finish()
    return warned, stayed_open


def adopt_either(name: str) -> list[str]:
    """Return the classes as which a session of each direction is adopted, and a trusted name."""
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
    """Return how many of 64 retrievals came before and after the finish, and whether it closed."""
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
