"""A lock that lets one thread at a time use an object, and never makes a thread wait for itself."""

from __future__ import annotations

import errno
import threading
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from pyluo.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Exclusive", "exclusively"]

P = ParamSpec("P")
R = TypeVar("R")


class Exclusive:
    """A lock for the methods of one object.

    A signal handler runs in the middle of whatever the main thread is doing. If the handler uses an
    object that its own thread is using, waiting would never end, and going on would change the
    object half-way through a request. So `exclusively` raises in this case.

    Args:
        subject: words for the object, for the message of the error.
    """

    __slots__ = ("_lock", "_subject")

    def __init__(self, subject: str) -> None:
        self._lock = threading.RLock()
        self._subject = subject

    def refuse_reentry(self, owner: object, method: str) -> None:
        """Raise RequestError (EDEADLK) if this thread holds the lock.

        Args:
            owner: the object that has the lock.
            method: the name of its method that was called.
        """
        # _is_owned is what threading.Condition uses. A flag of our own could not be kept right: an
        # exception in a signal handler can come between any two instructions.
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise RequestError(
                errno.EDEADLK,
                f"{type(owner).__name__}.{method}",
                self._subject,
                "This thread is using it already: a signal handler must not use it as well",
            )

    @property
    def lock(self) -> threading.RLock:
        """The lock itself."""
        return self._lock


class _HasLock(Protocol):
    @property
    def _exclusive(self) -> Exclusive: ...


S = TypeVar("S", bound=_HasLock)


def exclusively(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Make a method hold the lock `_exclusive` of its object.

    Raises:
        RequestError: the same thread is in such a method of the object already (EDEADLK).
    """

    @wraps(method)
    def locked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._exclusive.refuse_reentry(self, method.__name__)
        # In one line: a trace function that raises can do so before each line, and so could come
        # between the end of the block and the release of the lock, if that were a line of its own.
        with self._exclusive.lock: return method(self, *args, **kwargs)  # noqa: E701  # fmt: skip

    return locked
