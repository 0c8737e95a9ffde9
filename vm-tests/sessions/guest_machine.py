"""The guest's side of the state machine: does one thing, and says what came of it.

What is open is kept by number, in this module, as long as the kernel lives. Imports nothing but
pyluo and the stdlib.
"""

from __future__ import annotations

import os
from typing import Any

from pyluo import (
    IncomingSession,
    LiveUpdate,
    LuoError,
    Memfd,
    OutgoingSession,
    OwnedFd,
    Seal,
    session_from_fd,
)
from sessions.guest_requests import FINISH, PRESERVE_FD, RETRIEVE_FD

Session = OutgoingSession | IncomingSession
Outcome = tuple[str, Any]

sessions: dict[int, Session] = {}
files: dict[int, OwnedFd] = {}


def do(operation: str, *arguments: Any) -> Outcome:
    """("done", what came of it), or (the class of the exception, its errno)."""
    try:
        return "done", globals()[f"do_{operation}"](*arguments)
    except LuoError as error:
        return type(error).__name__, error.errno
    except OSError as error:
        return "OSError", error.errno


def do_make(number: int, kind: str, size: int, seals: int) -> None:
    if kind == "memfd":
        files[number] = Memfd.create("machine", size, seals=Seal(seals) or None)
    elif kind == "tmpfs":
        fd = os.open("/run", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, size)
        files[number] = Memfd.from_fd(fd)
    else:
        files[number] = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))


def do_write(file: int, data: bytes, offset: int) -> None:
    _memfd(file).write(data, offset)


def do_resize(file: int, size: int) -> None:
    _memfd(file).resize(size)


def do_seek(file: int, position: int) -> None:
    os.lseek(files[file].fileno(), position, os.SEEK_SET)


def do_look(file: int) -> tuple[bytes, int, int]:
    """The contents, the seals and the position."""
    memfd = _memfd(file)
    position = os.lseek(memfd.fileno(), 0, os.SEEK_CUR)
    return memfd.read(memfd.size, 0), int(memfd.seals), position


def do_close(file: int) -> None:
    files.pop(file).close()


def do_create(number: int, name: str) -> None:
    with LiveUpdate() as device:
        sessions[number] = device.create_session(name)


def do_retrieve_session(number: int, name: str) -> None:
    with LiveUpdate() as device:
        sessions[number] = device.retrieve_session(name)


def do_preserve(session: int, file: int, token: int) -> None:
    to = sessions[session]
    if isinstance(to, OutgoingSession):
        to.preserve(files[file], token)
    else:  # which pyluo's types rule out; the kernel is asked all the same
        PRESERVE_FD(to.fileno(), "", fd=files[file].fileno(), token=token)


def do_preserve_many(session: int, tokens: dict[int, int]) -> tuple[tuple[int, ...], str, int]:
    """The tokens that were in before one failed, and how that did; nothing if none did."""
    outgoing = sessions[session]
    assert isinstance(outgoing, OutgoingSession)
    try:
        outgoing.preserve_many({token: files[file] for token, file in tokens.items()})
    except LuoError as error:
        return error.preserved, type(error).__name__, error.errno or 0
    return tuple(tokens), "", 0


def do_retrieve(session: int, token: int, number: int) -> None:
    of = sessions[session]
    if isinstance(of, IncomingSession):
        files[number] = of.retrieve(token, Memfd)
    else:
        RETRIEVE_FD(of.fileno(), "", fd=-1, token=token)


def do_finish(session: int) -> None:
    """Ends an incoming session, and closes this descriptor of it."""
    of = sessions[session]
    if isinstance(of, IncomingSession):
        of.finish()
        del sessions[session]
    else:
        FINISH(of.fileno())


def do_finish_and_stay(session: int) -> None:
    """The request alone: the descriptor stays open."""
    FINISH(sessions[session].fileno())


def do_end(session: int) -> None:
    """Closes one descriptor."""
    of = sessions.pop(session)
    if isinstance(of, OutgoingSession):
        of.discard()
    else:
        os.close(of.detach())


def do_duplicate(session: int, number: int) -> str:
    """A second descriptor, adopted as what it is."""
    adopted = session_from_fd(os.dup(sessions[session].fileno()))
    sessions[number] = adopted
    return adopted.name


def do_adopt_as(session: int, kind: str) -> None:
    """Adopts it in its own place; as the other direction it is refused, and stays what it is."""
    old = sessions[session]
    if kind == "outgoing":
        sessions[session] = OutgoingSession.from_fd(old.fileno())
    else:
        sessions[session] = IncomingSession.from_fd(old.fileno())
    old.detach()


def do_clear(names: list[str]) -> None:
    """Ends all there is, for the next run to begin with nothing."""
    for session in list(sessions):
        do_end(session)
    for file in list(files):
        do_close(file)
    with LiveUpdate() as device:
        for name in names:
            try:
                device.retrieve_session(name).finish()
            except LuoError:
                continue


def _memfd(file: int) -> Memfd:
    memfd = files[file]
    assert isinstance(memfd, Memfd)
    return memfd
