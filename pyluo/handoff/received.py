"""The descriptors and the state received in a handoff."""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Self, TypeVar, overload

from pyluo.descriptor import Descriptor, OwnedFd

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from pyluo.descriptor import ReceivedFd
    from pyluo.peer import Peer

__all__ = ["Handoff"]

D = TypeVar("D", bound=Descriptor)


class Handoff:
    """Named descriptors and a state that another process or program has handed over.

    The end of the ``with`` block closes the descriptors that were not taken, except those of live
    update sessions, because closing the last descriptor of a session loses its files. If an
    exception leaves the block, none is closed, and all of them can still be taken. All descriptors
    have close-on-exec set. As long as the sender still has a file open, both processes share its
    file position and its status flags, such as O_NONBLOCK.

    Attributes:
        state: opaque bytes from the sender.
        peer: the process that sent the handoff; None after an exec.
        missing: the names of descriptors that did not come, because the sender died before it had
            sent them; see `Receiving.take_over`.
    """

    __slots__ = ("_files", "missing", "peer", "state")

    def __init__(
        self,
        files: Mapping[str, ReceivedFd],
        state: bytes,
        peer: Peer | None = None,
        missing: tuple[str, ...] = (),
    ) -> None:
        self._files = dict(files)
        self.state: bytes = state
        self.peer: Peer | None = peer
        self.missing: tuple[str, ...] = missing

    @property
    def files(self) -> Mapping[str, OwnedFd]:
        """The descriptors that were not taken yet, in the order in which they were sent.

        This object owns the descriptors.
        """
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
        """Return a descriptor, which the caller owns from now on.

        Args:
            name: the name of the descriptor in the handoff.
            type: the class of the object to return, such as `Memfd` or `OutgoingSession`.

        Raises:
            KeyError: there is no descriptor of this name, or it was taken already.
            RequestError: `type.from_fd` refuses the descriptor, which can still be taken.
        """
        owned = self._files[name]
        taken = type.from_fd(owned.fileno())
        owned.detach()
        del self._files[name]
        return taken

    def close(self) -> None:
        """Close the descriptors that were not taken, except those of sessions.

        Those stay open, and can still be taken; a ResourceWarning names them. Closing twice does
        nothing.
        """
        for name, file in reversed(list(self._files.items())):
            if not file.is_session:
                del self._files[name]
                file.close()
        if self._files:
            warnings.warn(
                f"sessions were handed over and not taken, and stay open: {list(self._files)}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def __repr__(self) -> str:
        return f"<Handoff {list(self._files)}, {len(self.state)} bytes of state>"
