"""The sessions of a store that its keeper has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.descriptor import OwnedFd
from pyluo.errors import KernelTooOldError, TokenNotFoundError
from pyluo.file_kind import SESSION_LINK, read_link
from pyluo.keepers.parcel import Parcel
from pyluo.session import IncomingSession, OutgoingSession, session_from_fd
from pyluo.stores.journal import TABLE_ROOM, TABLE_TOKEN, is_of_table

if TYPE_CHECKING:
    from pyluo.keepers.keeper import Keeper

__all__ = [
    "find_kept_incoming",
    "kept_sessions",
    "label_of_this_boot",
    "mark_as_finishing",
    "release_half_made",
    "release_incoming",
    "release_outgoing",
]

# The kernel does not tell whether a session is finished: a note of this kind, which a keeper has
# from before the finish, and a missing table do.
_FINISHING = "finishing"


def label_of_this_boot(kind: str) -> str:
    """Return the label under which a keeper keeps a store's session or table.

    The label differs from that of the boot before, whose sessions a service manager may have
    carried over.
    """
    return f"{kind}-{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}"


def kept_sessions(keeper: Keeper | None, name: str) -> dict[str, IncomingSession | OutgoingSession]:
    """Return new objects for the sessions of this name that a keeper has, by their labels.

    The keeper still has them, so that the caller may close their descriptors.
    """
    found: dict[str, IncomingSession | OutgoingSession] = {}
    try:
        for label, fd in {} if keeper is None else keeper.kept(name).items():
            with fd:
                if read_link(fd.fileno()) == SESSION_LINK + name:
                    found[label] = _wrap(os.dup(fd.fileno()), label)
    except BaseException:
        for session in found.values():
            os.close(session.detach())
        raise
    return found


def _wrap(fd: int, label: str) -> IncomingSession | OutgoingSession:
    try:
        return session_from_fd(fd)
    except KernelTooOldError:  # before Linux 7.2, only the label tells the direction
        kind = OutgoingSession if label == label_of_this_boot("outgoing") else IncomingSession
        return kind.from_fd(fd, trusted=True)
    except BaseException:
        os.close(fd)
        raise


def find_kept_incoming(keeper: Keeper | None, name: str) -> IncomingSession | None:
    """Return the incoming session of this name that a keeper has and nobody has finished.

    A session that a process finished, and died before it could release it, is released.
    """
    found: IncomingSession | None = None
    for session in kept_sessions(keeper, name).values():
        if isinstance(session, IncomingSession) and found is None:
            found = session
        else:
            os.close(session.detach())  # the keeper still has it
    if keeper is None or found is None or not _has_lost_its_table(found):
        return found
    if not _is_marked(keeper, name):
        return found  # it never had a table
    os.close(found.detach())
    release_incoming(keeper, name)
    return None


def mark_as_finishing(keeper: Keeper | None, name: str) -> None:
    """Have a keeper keep a note that the incoming session of this name is about to be finished."""
    if keeper is not None:
        with OwnedFd(os.eventfd(0)) as note:
            keeper.keep(name, label_of_this_boot(_FINISHING), note)


def release_half_made(keeper: Keeper | None, name: str) -> None:
    """End a renewal that a process began and died before it finished the incoming session.

    Its outgoing session is empty. It is told from other stores of the same name by the files that
    wait in its parcel.
    """
    if keeper is None:
        return
    kept = keeper.kept(name)
    table = kept.pop(label_of_this_boot("table"), None)
    for fd in kept.values():
        fd.close()
    if table is None:
        return
    with Parcel.from_fd(table.detach()) as parcel:
        waiting = any(not is_of_table(token) for files in parcel.unpack() for token in files)
    if waiting:
        release_outgoing(keeper, name)


def release_outgoing(keeper: Keeper, name: str) -> None:
    """Have a keeper release the outgoing session of this name, and the files of its table."""
    keeper.release(name, label_of_this_boot("outgoing"))
    keeper.release(name, label_of_this_boot("table"))


def _is_marked(keeper: Keeper, name: str) -> bool:
    kept = keeper.kept(name)
    for fd in kept.values():
        fd.close()
    return label_of_this_boot(_FINISHING) in kept


def release_incoming(keeper: Keeper | None, name: str) -> None:
    """Have a keeper release the incoming session of this name, which is finished."""
    if keeper is None:
        return
    for label, session in kept_sessions(keeper, name).items():
        os.close(session.detach())
        if isinstance(session, IncomingSession):
            keeper.release(name, label)
    keeper.release(name, label_of_this_boot(_FINISHING))


def _has_lost_its_table(session: IncomingSession) -> bool:
    """Return whether a session is finished that was a store, and so had a file with token 0."""
    try:
        session.retrieve(TABLE_TOKEN, size=TABLE_ROOM).close()
    except TokenNotFoundError:
        return True
    return False
