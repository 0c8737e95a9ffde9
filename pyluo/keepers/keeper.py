"""`Keeper`: what keeps descriptors open for a process that may end at any moment."""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pyluo.liveupdate import LiveUpdate

if TYPE_CHECKING:
    from pyluo.descriptor import HasFileno, OwnedFd

__all__ = ["Keeper", "KeeperChoice"]


class KeeperChoice(enum.Enum):
    """Which keeper a store has, unless the caller names one."""

    DEFAULT = "default"
    """The service manager if it stores descriptors for this process, else a holder process."""
    NONE = "none"
    """None: what only this process has open is lost when the process ends."""


class Keeper(ABC):
    """Keeps descriptors open under the name of a store, each with a label.

    A method that is interrupted can be called again, and then completes what it began.
    """

    @abstractmethod
    def keep(self, name: str, label: str, fd: HasFileno) -> None:
        """Keep a duplicate of a descriptor; return when it is kept.

        A descriptor that has the same name and label already is replaced.

        Args:
            name: the name of the store.
            label: letters, digits and hyphens.
            fd: the descriptor.

        Raises:
            KeeperError: the keeper cannot be reached, or has no room.
        """

    @abstractmethod
    def kept(self, name: str) -> dict[str, OwnedFd]:
        """Return new descriptors of what is kept under a name, by their labels.

        Raises:
            KeeperError: the keeper cannot be reached, or belongs to another user (EACCES).
        """

    @abstractmethod
    def release(self, name: str, label: str) -> None:
        """Keep a descriptor no longer; do nothing if there is none of this name and label.

        Raises:
            KeeperError: the keeper cannot be reached.
        """

    @abstractmethod
    def describe(self, name: str) -> str:
        """Return words for what keeps the descriptors of a store, such as "process 812"."""

    def retrieve(self, name: str, label: str, *, wait: float = 0.0) -> None:
        """Retrieve the incoming session of a store, and keep it.

        Args:
            name: the name of the session.
            label: the label under which the session is kept.
            wait: see `LiveUpdate`.

        Raises:
            RequestError: see `keep`, `LiveUpdate` and `LiveUpdate.retrieve_session`.
        """
        with LiveUpdate(wait=wait) as device:
            session = device.retrieve_session(name)
        self.keep(name, label, session)  # if this fails, the session can be retrieved again
        os.close(session.detach())
