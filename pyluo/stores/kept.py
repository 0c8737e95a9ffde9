"""The sessions of a store that its keeper has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.errors import KernelTooOldError, TokenNotFoundError
from pyluo.file_kind import SESSION_LINK, read_link
from pyluo.session import IncomingSession, OutgoingSession, session_from_fd
from pyluo.stores.journal import TABLE_TOKEN

if TYPE_CHECKING:
    from pyluo.keepers.keeper import Keeper

__all__ = ["find_kept_incoming", "kept_sessions", "label_of_this_boot"]


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
    for label, fd in {} if keeper is None else keeper.kept(name).items():
        with fd:
            if read_link(fd.fileno()) == SESSION_LINK + name:
                found[label] = _wrap(os.dup(fd.fileno()), label)
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

    Finished sessions are released.
    """
    found: IncomingSession | None = None
    for label, session in kept_sessions(keeper, name).items():
        if isinstance(session, IncomingSession) and found is None and not _is_finished(session):
            found = session
            continue
        os.close(session.detach())
        if isinstance(session, IncomingSession) and found is None:
            assert keeper is not None
            keeper.release(name, label)
    return found


def _is_finished(session: IncomingSession) -> bool:
    """Return whether a session is finished; every store has a file with token 0 until then."""
    try:
        session.retrieve(TABLE_TOKEN).close()
    except TokenNotFoundError:
        return True
    return False
