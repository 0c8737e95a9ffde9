"""`Store`: what outgoing and incoming stores have in common."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from pyluo.errors import StoreError
from pyluo.exclusive import Exclusive
from pyluo.liveupdate import LiveUpdate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from pyluo.keepers.keeper import Keeper
    from pyluo.session import IncomingSession, OutgoingSession
    from pyluo.stores.entry import Contents, Entry

__all__ = ["SessionSource", "Store", "open_device"]


class SessionSource(Protocol):
    """What creates and retrieves sessions: `LiveUpdate`, or an agent that has the device."""

    def create_session(self, name: str) -> OutgoingSession:
        """Create an outgoing session; see `LiveUpdate.create_session`."""

    def retrieve_session(self, name: str) -> IncomingSession:
        """Retrieve an incoming session; see `LiveUpdate.retrieve_session`."""


class Store:
    """The base class of both directions: what a store has in it.

    Several threads can use a store; a lock lets one of them in at a time. A signal handler that
    uses a store which its own thread is using gets a LuoError (EDEADLK).
    """

    def __init__(self, name: str, keeper: Keeper | None) -> None:
        self._exclusive = Exclusive(f"store {name!r}")
        self._name = name
        self._keeper = keeper

    @property
    def name(self) -> str:
        """The name of the store, which is that of its session."""
        return self._name

    @property
    def keeper(self) -> Keeper | None:
        """What keeps the session for this process; None if nothing does."""
        return self._keeper

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries of the store, in order."""
        return tuple(self._contents.entries.values())

    @property
    def meta(self) -> dict[str, Any]:
        """A copy of the store's metadata."""
        return dict(self._contents.meta)

    @property
    def closed(self) -> bool:
        """Whether this object has no session any more."""
        raise NotImplementedError

    @property
    def _contents(self) -> Contents:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._contents.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._contents.entries))

    def __contains__(self, name: object) -> bool:
        return name in self._contents.entries

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name!r} entries={len(self)}>"

    def _error(self, operation: str, number: int, what: str, hint: str) -> StoreError:
        subject = f"store {self._name!r}" + (f", {what}" if what else "")
        return StoreError(number, f"{type(self).__name__}.{operation}", subject, hint)


def open_device(device: SessionSource | None, wait: float) -> AbstractContextManager[SessionSource]:
    """Return a context manager of the given source, or one that opens and closes the device."""
    return nullcontext(device) if device is not None else LiveUpdate(wait=wait)
