"""The guest's side of the state machine: executes operations and reports their outcomes.

Open sessions and files are kept in this module, by number, until the next kernel. Imports only
pyluo and the standard library.
"""

from __future__ import annotations

import os
from typing import Any

from pyluo import (
    IncomingSession,
    LiveUpdate,
    Memfd,
    OutgoingSession,
    OwnedFd,
    RequestError,
    Seal,
    session_from_fd,
)
from sessions.guest_requests import FINISH, PRESERVE_FD, RETRIEVE_FD

Session = OutgoingSession | IncomingSession
Outcome = tuple[str, Any]

sessions: dict[int, Session] = {}
files: dict[int, OwnedFd] = {}


def do(operation: str, *arguments: Any) -> Outcome:
    """Execute an operation; return ("done", its result) or (the exception's class, its errno)."""
    try:
        return "done", globals()[f"do_{operation}"](*arguments)
    except RequestError as error:
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
    """Return the contents, the seals and the position of a file."""
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
    target = sessions[session]
    if isinstance(target, OutgoingSession):
        target.preserve(files[file], token)
    else:  # pyluo's types rule this out, so make the request directly
        PRESERVE_FD(target.fileno(), "", fd=files[file].fileno(), token=token)


def do_preserve_many(session: int, tokens: dict[int, int]) -> tuple[tuple[int, ...], str, int]:
    """Return the preserved tokens, and the exception's class and errno if one failed."""
    outgoing = sessions[session]
    assert isinstance(outgoing, OutgoingSession)
    try:
        outgoing.preserve_many({token: files[file] for token, file in tokens.items()})
    except RequestError as error:
        return error.preserved, type(error).__name__, error.errno or 0
    return tuple(tokens), "", 0


def do_retrieve(session: int, token: int, number: int) -> None:
    source = sessions[session]
    if isinstance(source, IncomingSession):
        files[number] = source.retrieve(token, Memfd)
    else:
        RETRIEVE_FD(source.fileno(), "", fd=-1, token=token)


def do_finish(session: int) -> None:
    """Finish a session, and close this descriptor of it."""
    source = sessions[session]
    if isinstance(source, IncomingSession):
        source.finish()
        del sessions[session]
    else:
        FINISH(source.fileno())


def do_finish_and_stay(session: int) -> None:
    """Make the finish request only; the descriptor stays open."""
    FINISH(sessions[session].fileno())


def do_end(session: int) -> None:
    """Close a descriptor of a session."""
    source = sessions.pop(session)
    if isinstance(source, OutgoingSession):
        source.discard()
    else:
        os.close(source.detach())


def do_duplicate(session: int, number: int) -> str:
    """Duplicate a session, adopt the duplicate, and return its name."""
    adopted = session_from_fd(os.dup(sessions[session].fileno()))
    sessions[number] = adopted
    return adopted.name


def do_adopt_as(session: int, kind: str) -> None:
    """Adopt a session as a direction; with the wrong one it is refused and unchanged."""
    old = sessions[session]
    if kind == "outgoing":
        sessions[session] = OutgoingSession.from_fd(old.fileno())
    else:
        sessions[session] = IncomingSession.from_fd(old.fileno())
    old.detach()


def do_clear(names: list[str]) -> None:
    """End all sessions and files, so that the next run starts from nothing."""
    for session in list(sessions):
        do_end(session)
    for file in list(files):
        do_close(file)
    with LiveUpdate() as device:
        for name in names:
            try:
                device.retrieve_session(name).finish()
            except RequestError:
                continue


def _memfd(file: int) -> Memfd:
    memfd = files[file]
    assert isinstance(memfd, Memfd)
    return memfd
