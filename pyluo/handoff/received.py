"""What came from the process before."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Self, TypeVar, overload

from pyluo.descriptor import Descriptor, OwnedFd

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from pyluo.peer import Peer

__all__ = ["Handoff"]

D = TypeVar("D", bound=Descriptor)


class Handoff:
    """Descriptors with names, and a state, that another process or program has handed over.

    As a context manager it closes, in the end, what was not taken. Everything in it is
    close-on-exec. What a descriptor shares with the process before (the file position, O_NONBLOCK)
    it goes on sharing while that has it open.

    Attributes:
        state: as it was given; its digest was right.
        peer: who sent it; None if it came through exec.
    """

    __slots__ = ("_files", "peer", "state")

    def __init__(
        self, files: Mapping[str, OwnedFd], state: bytes, peer: Peer | None = None
    ) -> None:
        self._files = dict(files)
        self.state = state
        self.peer = peer

    @property
    def files(self) -> Mapping[str, OwnedFd]:
        """What was not taken yet, in the order in which it was given; still this object's."""
        return MappingProxyType(self._files)

    @overload
    def take(self, name: str) -> OwnedFd: ...

    @overload
    def take(self, name: str, type: type[D]) -> D: ...

    def take(
        self,
        name: str,
        type: type[Descriptor] = OwnedFd,  # noqa: A002
    ) -> Descriptor:
        """Gives one descriptor to the caller, who has to close it.

        Args:
            name: under which it was handed over.
            type: what to make of it, such as `Memfd` or `OutgoingSession`.

        Raises:
            KeyError: there is none of this name, or it was taken.
            LuoError: it is not of this type, as `type.from_fd` says; it was not taken then.
        """
        owned = self._files[name]
        taken = type.from_fd(owned.fileno())
        owned.detach()
        del self._files[name]
        return taken

    def close(self) -> None:
        """Closes what was not taken; a second time does nothing."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Handoff {list(self._files)}, {len(self.state)} bytes of state>"
