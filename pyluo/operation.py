"""A request to the kernel, with what each errno means that it may return.

The same errno means different things for different requests, so each request carries a table of its
own, where it is declared. The manual's table of errors is made from all of them.
"""

from __future__ import annotations

import errno as _errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyluo.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    # The class of the exception, whose own hint is shown; the hint of one of the operation's usual
    # class; or both.
    Refusal = type[RequestError] | str | tuple[type[RequestError], str]

__all__ = ["Operation", "declared", "raising"]

_declared: list[Operation] = []


class Operation:
    """A request to the kernel, or one of pyluo's own that consists of several.

    Args:
        name: the kernel's name of the request; lowercase words for one of pyluo's own.
        kind: the class of its exceptions, but for those that `refusals` gives another class.
        refusals: what an errno means.

    Attributes:
        name: the name.
        kind: the usual class of its exceptions.
        refusals: the classes and the hints (possibly empty) of errnos.
    """

    __slots__ = ("kind", "name", "refusals")

    def __init__(
        self,
        name: str,
        kind: type[RequestError] = RequestError,
        refusals: Mapping[int, Refusal] | None = None,
    ) -> None:
        self.name: str = name
        self.kind: type[RequestError] = kind
        self.refusals: dict[int, tuple[type[RequestError], str]] = {}
        for errno, refusal in (refusals or {}).items():
            if isinstance(refusal, tuple):
                self.refusals[errno] = refusal
            else:
                self.refusals[errno] = (
                    (kind, refusal) if isinstance(refusal, str) else (refusal, "")
                )
        _declared.append(self)

    def error(self, errno: int, subject: str = "", hint: str = "") -> RequestError:
        """Return the exception for an errno that the request returned, or pyluo in its place.

        Args:
            errno: the errno.
            subject: words for the object of the request.
            hint: the reason, or what to do, if that is more than the table knows.
        """
        kind, known = self.refusals.get(errno) or (self.kind, "")
        return kind(errno, self.name, subject, hint or known)

    @contextmanager
    def raising(self, subject: str = "") -> Iterator[None]:
        """Turn an OSError that the ``with`` block raises into an exception of this request."""
        try:
            yield
        except RequestError:
            raise
        except OSError as error:
            raise self.error(_number(error), subject) from None


@contextmanager
def raising(name: str, subject: str = "") -> Iterator[None]:
    """Turn an OSError that the ``with`` block raises into a RequestError.

    For a request whose errnos mean no more than errno(3) says.

    Args:
        name: the name of the request.
        subject: words for the object of the request.
    """
    try:
        yield
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(_number(error), name, subject) from None


def _number(error: OSError) -> int:
    default = _errno.ETIMEDOUT if isinstance(error, TimeoutError) else _errno.EIO
    return error.errno or default


def declared() -> tuple[Operation, ...]:
    """Return the operations of the modules that were imported so far, in order of their names."""
    return tuple(sorted(_declared, key=lambda operation: operation.name))
