"""Sessions: the named sets of files that go through a live update together.

Two types, because the kernel keeps two directions strictly apart. Neither has a `close()`: closing
the last descriptor of an outgoing session gives everything up, and closing that of an incoming one
destroys what was not retrieved. `OutgoingSession.discard()` and `IncomingSession.finish()` say
which is meant; a session that is dropped without a word is kept open, and warned about.
"""

from __future__ import annotations

import errno
import threading
import warnings
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar, overload

from pyluo import guards
from pyluo._sys import Ioctl
from pyluo._sys import preserve_many as preserve_in_one_call
from pyluo.descriptor import Descriptor, OwnedFd, adopt, number_of
from pyluo.errors import (
    LuoError,
    WrongSessionError,
    from_errno,
)
from pyluo.file_kind import SESSION_LINK, describe_file, missing_support, read_link

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["IncomingSession", "OutgoingSession", "find_direction", "session_from_fd"]

_PRESERVE_FD = Ioctl("LIVEUPDATE_SESSION_PRESERVE_FD", "liveupdate_session_preserve_fd")
_RETRIEVE_FD = Ioctl("LIVEUPDATE_SESSION_RETRIEVE_FD", "liveupdate_session_retrieve_fd")
_FINISH = Ioctl("LIVEUPDATE_SESSION_FINISH", "liveupdate_session_finish")
_GET_NAME = Ioctl("LIVEUPDATE_SESSION_GET_NAME", "liveupdate_session_get_name")
_TOKENS = 1 << 64

F = TypeVar("F", bound=OwnedFd)


class _Session(Descriptor):
    """What both directions share. Requests of several threads take turns, as in the kernel."""

    __slots__ = ("_lock", "_name")
    _direction: ClassVar[str]

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()
        self._name = name

    @classmethod
    def from_fd(cls, fd: int, *, trusted: bool = False) -> Self:
        """Takes over the descriptor of a session, as received from another process.

        Args:
            fd: the descriptor.
            trusted: take the caller's word for the direction, as kernels before 7.2 need.

        Raises:
            KernelTooOldError: EINVAL, the kernel cannot tell the directions apart. Linux 7.2.
            WrongSessionError: it is a session of the other direction, or none at all; the
                descriptor stays the caller's, and the session as it was.
        """
        if trusted:
            return cls(fd, _read_name_from_link(fd))
        name, direction = _read_name(fd), find_direction(fd)
        if direction != cls._direction:
            raise WrongSessionError(
                errno.EINVAL,
                "from_fd",
                f"descriptor {fd}",
                f"It is an {direction} session, where an {cls._direction} one was expected",
            )
        return cls(fd, name)

    @property
    def name(self) -> str:
        """The name of the session, as it was created.

        Of an adopted session the kernel is asked; of one adopted as trusted it is read from the
        link in /proc/self/fd, as kernels before 7.2 need.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_GET_NAME. Linux 7.2.
        """
        return self._name

    def detach(self) -> int:
        """Gives the descriptor up, still open; closing the last one is the caller's peril now."""
        with self._lock:
            return super().detach()

    def _subject(self, what: str = "") -> str:
        return f"{self._direction} session {self._name!r}" + (f", {what}" if what else "")

    def _error_for(self, number: int, operation: str, subject: str) -> LuoError:
        """The exception of a refusal; of EINVAL, whether the direction was wrong after all."""
        if number == errno.EINVAL:
            try:
                direction = find_direction(self.fileno())
            except LuoError:
                direction = self._direction
            if direction != self._direction:
                return WrongSessionError(
                    number, operation, subject, f"It is an {direction} session"
                )
        return from_errno(number, operation, subject)

    def _close_locked(self) -> None:
        with self._lock:
            self._close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(
                f"{self!r} was dropped; its descriptor stays open, since closing it would lose "
                f"what the session holds",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {self._name!r} {state}>"


class OutgoingSession(_Session):
    """A session that the next live update carries over, as long as its descriptor is open.

    As a context manager it stays open for the jump; an exception discards it. Safe to use from
    several threads.
    """

    __slots__ = ()
    _direction = "outgoing"

    def preserve(self, fd: OwnedFd | int, token: int, *, allow_noexec: bool = False) -> None:
        """Puts a file into the session, to be retrieved by the same token after the update.

        Every page of the file is allocated and pinned. The file can be used on, but its size
        cannot change any more, and holes cannot be punched. Seals count as they are now: one that
        is added later is lost on the kernels up to 7.3, as is that a descriptor was read-only.

        Args:
            fd: the file; it stays the caller's, and may be closed: the session keeps the file.
            token: 0 to 2**64 - 1, chosen by the caller, one for each file of the session.
            allow_noexec: preserve even a memfd made with MFD_NOEXEC_SEAL, which comes back
                executable and write-sealed on the kernels up to 7.3.

        Raises:
            ValueError: the token is out of range.
            TokenInUseError: EEXIST.
            AlreadyPreservedError: EBUSY, in any session.
            NotPreservableError: ENOENT, the kernel has no support for this kind of file;
                EOPNOTSUPP, its seals; EFBIG, a tebibyte or more; EINVAL, a noexec memfd, refused
                by pyluo.
            PreservedMemoryError: ENOMEM, refused by pyluo: the kernel would run out of memory.
            LuoError: EBADF; ENOMEM, ENOSPC.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_PRESERVE_FD. Linux 6.19.
        """
        number = number_of(fd)
        _check_token(token)
        with self._lock:
            session = self.fileno()
            self._check_preservable([number], [token], allow_noexec)
            try:
                _PRESERVE_FD(session, fd=number, token=token)
            except LuoError as error:
                raise self._preserve_error(error.errno or errno.EIO, number, token) from None

    def preserve_many(
        self,
        files: Mapping[int, OwnedFd | int],
        *,
        allow_noexec: bool = False,
        guarded: bool = True,
    ) -> None:
        """Puts each file into the session under its token, in the mapping's order, from C.

        Args:
            files: token to file.
            allow_noexec: as for `preserve`.
            guarded: False leaves pyluo's own checks out, for files that were preserved before and
                take no more memory now.

        Raises:
            LuoError: as `preserve` does, for the first that fails; `preserved` on the exception
                lists the tokens that are in the session by then. They stay in.
        """
        tokens = list(files)
        numbers = [number_of(fd) for fd in files.values()]
        for token in tokens:
            _check_token(token)
        with self._lock:
            session = self.fileno()
            if guarded:
                self._check_preservable(numbers, tokens, allow_noexec)
            done, failure = preserve_in_one_call(session, numbers, tokens)
            if failure:
                error = self._preserve_error(failure, numbers[done], tokens[done])
                error.preserved = tuple(tokens[:done])
                raise error

    def discard(self) -> None:
        """Gives everything in the session up and closes it; a second time does nothing.

        The files themselves stay as they are, and those who have them open keep them.
        """
        self._close_locked()

    def _check_preservable(self, fds: list[int], tokens: list[int], allow_noexec: bool) -> None:
        """Refuses what the kernel would take and not give back, before anything is done."""
        if not allow_noexec:
            for fd, token in zip(fds, tokens, strict=True):
                guards.refuse_noexec(fd, partial(self._describe, fd, token))
        guards.refuse_excess_memory(fds, self._subject)

    def _preserve_error(self, number: int, fd: int, token: int) -> LuoError:
        """The exception of a file that the kernel did not take."""
        error = self._error_for(number, _PRESERVE_FD.name, self._describe(fd, token))
        if number == errno.ENOENT and (missing := missing_support(fd)):
            error.hint = missing
        return error

    def _describe(self, fd: int, token: int) -> str:
        return self._subject(f"token {token}, {describe_file(fd)} (descriptor {fd})")

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()


class IncomingSession(_Session):
    """A session that came over from the previous kernel.

    As a context manager it is finished at the end; an exception leaves it open, so that nothing is
    destroyed that was not yet retrieved. Safe to use from several threads.
    """

    __slots__ = ()
    _direction = "incoming"

    @overload
    def retrieve(self, token: int) -> OwnedFd: ...

    @overload
    def retrieve(self, token: int, type: type[F]) -> F: ...

    def retrieve(
        self,
        token: int,
        type: type[OwnedFd] = OwnedFd,  # noqa: A002
    ) -> OwnedFd:
        """A new descriptor, close-on-exec, of a preserved file.

        Retrieving one token twice gives two descriptors of one open file, with one position.

        Args:
            token: as given to `OutgoingSession.preserve`.
            type: what to make of the descriptor, such as `Memfd`.

        Raises:
            ValueError: the token is out of range.
            TokenNotFoundError: ENOENT, no such token, or the session is finished.
            LuoError: the kernel could not restore the file; later attempts give the same errno,
                and the file is lost.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_RETRIEVE_FD. Linux 6.19.
        """
        _check_token(token)
        subject = self._subject(f"token {token}")
        with self._lock:
            try:
                fd = _RETRIEVE_FD(self.fileno(), subject, fd=-1, token=token).integer("fd")
            except LuoError as error:
                raise self._error_for(error.errno or errno.EIO, error.operation, subject) from None
        return adopt(fd, type)

    def finish(self) -> None:
        """Ends the session: the kernel lets go of it, and what was not retrieved is destroyed.

        A second time does nothing. If the kernel refuses, the session stays open as it was.

        Raises:
            LuoError: the kernel could not finish; it may be tried again.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_FINISH. Linux 6.19.
        """
        if self.closed:
            return
        subject = self._subject()
        with self._lock:
            if not self.closed:
                try:
                    _FINISH(self.fileno(), subject)
                except LuoError as error:
                    number = error.errno or errno.EIO
                    raise self._error_for(number, error.operation, subject) from None
                self._close()

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()


def session_from_fd(fd: int) -> OutgoingSession | IncomingSession:
    """Takes over the descriptor of a session, whichever its direction.

    Raises:
        KernelTooOldError: EINVAL, the kernel cannot tell the directions apart. Linux 7.2.
        WrongSessionError: it is no session; it stays the caller's.
    """
    name = _read_name(fd)
    kind = IncomingSession if find_direction(fd) == "incoming" else OutgoingSession
    return kind(fd, name)


def _read_name(fd: int) -> str:
    _read_name_from_link(fd)
    return _GET_NAME(fd, f"descriptor {fd}").text("name")


def _read_name_from_link(fd: int) -> str:
    """The name in the link of a session's descriptor; any other descriptor is an error."""
    link = read_link(fd)
    if not link.startswith(SESSION_LINK):
        raise WrongSessionError(
            errno.EINVAL, "from_fd", f"descriptor {fd}", f"It is {describe_file(fd)}, no session"
        )
    return link.removeprefix(SESSION_LINK)


def find_direction(fd: int) -> str:
    """Whether the descriptor of a session is "incoming" or "outgoing"; the session stays as it is.

    Raises:
        KernelTooOldError: EINVAL, the kernel checks the direction too late to tell. Linux 7.2.
    """
    _read_name(fd)  # came with the check of the direction, before that of the tail
    return "incoming" if _RETRIEVE_FD.errno_for_unknown_tail(fd) == errno.E2BIG else "outgoing"


def _check_token(token: int) -> None:
    if not 0 <= token < _TOKENS:
        raise ValueError(f"token {token}: a token is 0 to 2**64 - 1")
