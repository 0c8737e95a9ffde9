"""Sessions: named sets of files that go through a live update together.

A session has a direction. An outgoing session is filled for the next kernel; an incoming session
came from the previous kernel. The kernel accepts different requests for each direction, so there
are two classes.

Neither class has a `close()`, because closing the last descriptor loses files: those of an outgoing
session are no longer preserved, and those of an incoming session are destroyed unless they were
retrieved. Call `OutgoingSession.discard()` or `IncomingSession.finish()` instead. If neither is
called, the descriptor stays open when the object is garbage-collected, and a ResourceWarning is
given.
"""

from __future__ import annotations

import errno
import os
import warnings
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar, overload

from pyluo import guards
from pyluo._sys import Ioctl
from pyluo._sys import preserve_many as preserve_in_one_call
from pyluo.descriptor import Descriptor, OwnedFd, fileno_of, wrap_new_fd
from pyluo.errors import (
    AlreadyPreservedError,
    KernelTooOldError,
    LuoError,
    NotPreservableError,
    RequestError,
    SessionRetrievedError,
    TokenInUseError,
    TokenNotFoundError,
)
from pyluo.exclusive import Exclusive, exclusively
from pyluo.file_kind import SESSION_LINK, describe_file, missing_support, read_link

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyluo._sys import Request
    from pyluo.operation import Operation

__all__ = ["IncomingSession", "OutgoingSession", "find_direction", "session_from_fd"]

_LOST = (
    "every later attempt will fail in the same way, so the file is lost: retrieve files early, as "
    "root, outside any memory limit"
)
_PRESERVE_FD = Ioctl(
    "LIVEUPDATE_SESSION_PRESERVE_FD",
    "liveupdate_session_preserve_fd",
    LuoError,
    {
        errno.EEXIST: TokenInUseError,
        errno.EBUSY: AlreadyPreservedError,
        errno.ENOENT: NotPreservableError,
        errno.EOPNOTSUPP: (
            NotPreservableError,
            "The memfd has seals that this kernel cannot carry over",
        ),
        errno.EFBIG: (
            NotPreservableError,
            "The file has more than 2^32 pages",
        ),
        errno.EINVAL: (
            "The kernel supports this kind of file but could not preserve this one; see dmesg"
        ),
        errno.EBADF: "The descriptor is not open",
        errno.ENOMEM: (
            "Preserving allocates every page of the file, even where it has holes: free "
            "memory, or preserve less"
        ),
        errno.ENOSPC: "Linux {release} has no room for another file in this session",
    },
)
_RETRIEVE_FD = Ioctl(
    "LIVEUPDATE_SESSION_RETRIEVE_FD",
    "liveupdate_session_retrieve_fd",
    LuoError,
    {
        errno.ENOENT: TokenNotFoundError,
        errno.EINVAL: ("The kernel could not read what was handed over for this token, see dmesg; ")
        + _LOST,
        errno.ENOMEM: ("There was no memory for the file, or none in the caller's memory cgroup; ")
        + _LOST,
        errno.ENOSPC: (
            "There was no memory for the file, or vm.overcommit_memory=2 allows no more; "
        )
        + _LOST,
        errno.ENFILE: "The system has too many open files, see fs.file-max; " + _LOST,
        errno.EMFILE: (
            "This process has too many open files, see RLIMIT_NOFILE; the file is still "
            "in the session"
        ),
    },
)
_FINISH = Ioctl(
    "LIVEUPDATE_SESSION_FINISH",
    "liveupdate_session_finish",
    LuoError,
    {
        errno.EINVAL: (
            "An outgoing session can preserve; an incoming session can retrieve and finish"
        ),
        errno.EBUSY: ("The kernel still needs one of the files; nothing was finished: try again"),
    },
)
_GET_NAME = Ioctl(
    "LIVEUPDATE_SESSION_GET_NAME",
    "liveupdate_session_get_name",
    LuoError,
    {
        errno.EINVAL: (
            KernelTooOldError,
            "Only Linux 7.2 and newer can report the name of a session; this kernel is {release}",
        ),
    },
)
_TOKENS = 1 << 64

F = TypeVar("F", bound=OwnedFd)


# The descriptors of incoming sessions whose objects were dropped, by the names of the sessions.
_dropped: dict[str, int] = {}


class _Session(Descriptor):
    """The base class of both directions. A lock lets one thread at a time make a request."""

    __slots__ = ("_exclusive", "_name", "_request")
    _direction: ClassVar[str]

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self._exclusive = Exclusive(f"{self._direction} session {name!r}")
        self._name = name
        self._request: Request | None = None

    def _open(self, ioctl: Ioctl, device: int, encoded_name: bytes) -> None:
        """Take a descriptor of the session from the device, for a new object without one.

        An exception in a signal handler loses no descriptor: until it is in `_fd`, it is in
        `_request`, where `__del__` finds it.
        """
        self._request = ioctl.prepare(fd=-1, name=encoded_name)
        self._request.attempt(device)
        if self._request.errno:
            raise ioctl.error(self._request.errno, f"session {self._name!r}")
        self._fd = self._request.integer("fd")
        self._request = None

    @classmethod
    def from_fd(cls, fd: int, *, trusted: bool = False) -> Self:
        """Return an object that owns the open descriptor of a session.

        Args:
            fd: the descriptor, for example one received from another process.
            trusted: whether to skip the check of the direction, which kernels before 7.2 do not
                support.

        Raises:
            KernelTooOldError: the kernel is older than 7.2, so that the direction cannot be checked
                (EINVAL).
            LuoError: the session has the other direction, or the descriptor does not refer
                to a session. The caller still owns the descriptor, and the session is unchanged.
        """
        if trusted:
            return cls(fd, _read_name_from_link(fd))
        name, direction = _read_name(fd), find_direction(fd)
        if direction != cls._direction:
            raise LuoError(
                errno.EINVAL,
                "from_fd",
                f"descriptor {fd}",
                f"It is an {direction} session, where an {cls._direction} one was expected",
            )
        return cls(fd, name)

    @property
    def name(self) -> str:
        """The name that the session was created with.

        If the object came from `from_fd`, the kernel reported the name; with ``trusted=True`` the
        name was read from the link in /proc/self/fd, because only Linux 7.2 and newer report it.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_GET_NAME. Linux 7.2.
        """
        return self._name

    def detach(self) -> int:
        """Return the descriptor without closing it; the caller owns it from now on.

        When the last descriptor of the session is closed, the files of an outgoing session are no
        longer preserved, and those of an incoming session are destroyed unless they were retrieved.
        """
        return self._detach()

    @exclusively
    def _detach(self) -> int:
        return super().detach()

    def _subject(self, what: str = "") -> str:
        return f"{self._direction} session {self._name!r}" + (f", {what}" if what else "")

    def _error_for(self, number: int, operation: Operation, subject: str) -> RequestError:
        """Return the exception for an errno.

        EINVAL may mean that the session has the other direction, so the direction is checked then.
        """
        if number == errno.EINVAL:
            try:
                direction = find_direction(self.fileno())
            except RequestError:
                direction = self._direction
            if direction != self._direction:
                return LuoError(number, operation.name, subject, f"It is an {direction} session")
        return operation.error(number, subject)

    def _dropped_fd(self) -> int:
        """Return the descriptor that this object still owns; -1 if there is none."""
        request: Request | None = getattr(self, "_request", None)
        return request.integer("fd") if self._fd < 0 and request is not None else self._fd

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {self._name!r} {state}>"


class OutgoingSession(_Session):
    """A session that the next live update carries over if a descriptor of it is still open then.

    Only `discard` ends the session. If the object is dropped instead, its descriptor stays open
    until the process ends; the descriptor of a session that `LiveUpdate.create_session` has just
    created, and that nobody has used, is closed. Several threads can use the object.
    """

    __slots__ = ("_unused",)
    _direction = "outgoing"

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name)
        self._unused = False

    @classmethod
    def create(cls, ioctl: Ioctl, device: int, name: str, encoded_name: bytes) -> Self:
        """Create a session with an ioctl of the device; `LiveUpdate.create_session` calls this."""
        session = cls(-1, name)
        session._unused = True
        session._open(ioctl, device, encoded_name)
        return session

    def fileno(self) -> int:
        """Return the number of the descriptor.

        Raises:
            ValueError: the descriptor is closed, or was detached.
        """
        self._unused = False  # from now on others may put files into the session
        return super().fileno()

    def preserve(self, fd: OwnedFd | int, token: int, *, allow_noexec: bool = False) -> None:
        """Preserve a file: put it into the session, so that it can be retrieved after the update.

        The kernel allocates and pins every page of the file. The file can still be used, but its
        size can no longer change, and no holes can be punched into it. On kernels up to 7.3, a seal
        that is added later is not carried over, and a read-only descriptor can also be written to
        after the update.

        Args:
            fd: a descriptor of the file. The caller still owns the descriptor and may close it,
                because the session has its own reference to the file.
            token: a number from 0 to 2**64 - 1 by which the file is retrieved; different for each
                file of the session.
            allow_noexec: whether to preserve even a memfd made with MFD_NOEXEC_SEAL. Kernels up to
                7.3 restore such a memfd as executable and sealed against writing.

        Raises:
            ValueError: the token is out of range.
            TokenInUseError: the session has a file with this token already (EEXIST).
            AlreadyPreservedError: the file is in this or another session already (EBUSY).
            NotPreservableError: the kernel does not support this kind of file (ENOENT) or its
                seals (EOPNOTSUPP); the file has a tebibyte or more (EFBIG); pyluo refuses a
                memfd made with MFD_NOEXEC_SEAL (EINVAL).
            PreservedMemoryError: pyluo refuses because the kernel would run out of memory (ENOMEM).
            RequestError: the descriptor is not open (EBADF); the kernel has no memory (ENOMEM) or
                no room in the session (ENOSPC).

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_PRESERVE_FD. Linux 6.19.
        """
        self.preserve_many({token: fd}, allow_noexec=allow_noexec)

    @exclusively
    def preserve_many(
        self,
        files: Mapping[int, OwnedFd | int],
        *,
        allow_noexec: bool = False,
        guarded: bool = True,
    ) -> None:
        """Preserve several files, in the order of the mapping, with one call into C.

        Args:
            files: a descriptor for each token.
            allow_noexec: see `preserve`.
            guarded: whether to make pyluo's own checks. They are not needed for files that passed
                `check`, or that passed them in an earlier session, which has ended: the pages of
                such files are allocated already.

        Raises:
            RequestError: the first failure; see `preserve`. The files before the one that failed
                stay in the session; the attribute `preserved` of the exception lists their tokens.
        """
        session = self.fileno()
        tokens = list(files)
        numbers = [fileno_of(fd) for fd in files.values()]
        if guarded:
            self._check(tokens, numbers, allow_noexec)
        done, failure = preserve_in_one_call(session, numbers, tokens)
        if failure:
            error = self._preserve_error(failure, numbers[done], tokens[done])
            error.preserved = tuple(tokens[:done])
            raise error

    @exclusively
    def has(self, token: int) -> bool:
        """Return whether the session has a file with this token.

        The kernel has no request for this. It looks at the token before it looks at the file, so a
        request to preserve no file at all tells.

        Args:
            token: the token to look for.

        Raises:
            LuoError: the kernel refused the request otherwise, as after the session was discarded.
            ValueError: no session can have this token.

        Source: kernel/liveupdate/luo_file.c, luo_preserve_file();
        include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_PRESERVE_FD. Linux 6.19.
        """
        _check_token(token)
        number = _PRESERVE_FD.attempt(self.fileno(), fd=-1, token=token).errno
        if number not in (errno.EEXIST, errno.EBADF):
            raise self._error_for(number, _PRESERVE_FD, self._subject(f"token {token}"))
        return number == errno.EEXIST

    def check(self, files: Mapping[int, OwnedFd | int], *, allow_noexec: bool = False) -> None:
        """Refuse files that the kernel would accept and then lose, change, or crash on.

        Args:
            files: a descriptor for each token.
            allow_noexec: see `preserve`.

        Raises:
            RequestError: see `preserve`, where an error says that pyluo refuses.
        """
        self._check(list(files), [fileno_of(fd) for fd in files.values()], allow_noexec)

    def _check(self, tokens: Sequence[int], numbers: Sequence[int], allow_noexec: bool) -> None:
        for token in tokens:
            _check_token(token)
        demand = guards.MemoryDemand()
        noexec = demand.add(numbers)
        if noexec is not None and not allow_noexec:
            raise guards.noexec_error(self._describe(numbers[noexec], tokens[noexec]))
        demand.refuse_excess(self._subject)

    @exclusively
    def discard(self) -> None:
        """Close the session, so that its files are no longer preserved.

        Discarding a session twice does nothing. The files themselves are unchanged, and other
        descriptors of them stay open. If another process has the session open, the session and its
        files stay preserved.
        """
        self._close()

    def _preserve_error(self, number: int, fd: int, token: int) -> RequestError:
        """Return the exception for a file that the kernel did not preserve."""
        error = self._error_for(number, _PRESERVE_FD, self._describe(fd, token))
        if number == errno.ENOENT and (missing := missing_support(fd)):
            error.hint = missing
        return error

    def _describe(self, fd: int, token: int) -> str:
        return self._subject(f"token {token}, {describe_file(fd)} (descriptor {fd})")

    def __del__(self) -> None:
        fd = self._dropped_fd()
        if fd < 0:
            return
        if self._unused:
            what = "its descriptor was closed, because nobody had used it"
            os.close(fd)
        else:
            what = "its descriptor stays open, because closing it could lose the session's files"
        _warn_of_drop(self, what)


class IncomingSession(_Session):
    """A session that the previous kernel handed over.

    Only `finish` ends the session. If the object is dropped instead, its descriptor stays open, and
    `LiveUpdate.retrieve_session` returns it again. Several threads can use the object.
    """

    __slots__ = ()
    _direction = "incoming"

    @classmethod
    def retrieve_from(cls, ioctl: Ioctl, device: int, name: str, encoded_name: bytes) -> Self:
        """Retrieve a session from the device; `LiveUpdate.retrieve_session` calls this."""
        session = cls(-1, name)
        try:
            session._open(ioctl, device, encoded_name)
        except SessionRetrievedError:
            fd = _dropped.get(name, -1)
            if read_link(fd) != SESSION_LINK + name:
                raise
            session._fd = fd
            del _dropped[name]
        return session

    @overload
    def retrieve(self, token: int, *, size: int | None = None) -> OwnedFd: ...

    @overload
    def retrieve(self, token: int, type: type[F], *, size: int | None = None) -> F: ...

    def retrieve(
        self,
        token: int,
        type: type[OwnedFd] = OwnedFd,  # noqa: A002
        *,
        size: int | None = None,
    ) -> OwnedFd:
        """Return a new descriptor of a preserved file, with close-on-exec set.

        If a token is retrieved twice, both descriptors refer to the same open file description, and
        so share their file position.

        Args:
            token: the token given to `OutgoingSession.preserve`.
            type: the class of the object to return, such as `Memfd`.
            size: the size of the file in bytes, if the caller knows it; 0 if the file was retrieved
                before. This counts only in a memory cgroup with a limit: without a size, the file
                is assumed to be as large as all memory that is in use.

        Raises:
            ValueError: the token is out of range.
            TokenNotFoundError: there is no such token, or the session is finished (ENOENT).
            PreservedMemoryError: the caller's memory cgroup has no room for the file, which would
                be lost (ENOMEM). Nothing was retrieved.
            LuoError: the kernel could not restore the file. If the errno is not EMFILE, later
                attempts return the same errno, and the file is lost.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_RETRIEVE_FD. Linux 6.19.
        """
        return wrap_new_fd(self._retrieve(token, size), type)

    @exclusively
    def _retrieve(self, token: int, size: int | None) -> int:
        _check_token(token)
        guards.refuse_full_cgroup(size, lambda: self._subject(f"token {token}"))
        reply = _RETRIEVE_FD.attempt(self.fileno(), fd=-1, token=token)
        if reply.errno:
            raise self._error_for(reply.errno, _RETRIEVE_FD, self._subject(f"token {token}"))
        return reply.integer("fd")

    @exclusively
    def finish(self) -> None:
        """Finish and close the session; the kernel destroys every file that was not retrieved.

        Finishing a session twice does nothing. If the kernel refuses, the session stays open and
        unchanged.

        Raises:
            LuoError: the kernel could not finish the session; the caller may try again.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_FINISH. Linux 6.19.
        """
        if self.closed:
            return
        if number := _FINISH.attempt(self.fileno()).errno:
            raise self._error_for(number, _FINISH, self._subject())
        self._close()

    def __del__(self) -> None:
        fd = self._dropped_fd()
        if fd >= 0:
            _dropped[self._name] = fd
            what = "its descriptor stays open, and LiveUpdate.retrieve_session() returns it again"
            _warn_of_drop(self, what)


def _warn_of_drop(session: _Session, what: str) -> None:
    warnings.warn(f"{session!r} was dropped; {what}", ResourceWarning, stacklevel=3, source=session)


def session_from_fd(fd: int) -> OutgoingSession | IncomingSession:
    """Return an object of the right class that owns the open descriptor of a session.

    Raises:
        KernelTooOldError: the kernel is older than 7.2, so that the direction is unknown (EINVAL).
        LuoError: the descriptor does not refer to a session.

    After an exception the caller still owns the descriptor.
    """
    name = _read_name(fd)
    kind = IncomingSession if find_direction(fd) == "incoming" else OutgoingSession
    return kind(fd, name)


def _read_name(fd: int) -> str:
    _read_name_from_link(fd)
    return _GET_NAME(fd, f"descriptor {fd}").text("name")


def _read_name_from_link(fd: int) -> str:
    """Return the session's name from the link of its descriptor in /proc.

    Raises:
        LuoError: the descriptor does not refer to a session.
    """
    link = read_link(fd)
    if not link.startswith(SESSION_LINK):
        raise LuoError(
            errno.EINVAL,
            "from_fd",
            f"descriptor {fd}",
            f"It is {describe_file(fd)} and not a session",
        )
    return link.removeprefix(SESSION_LINK)


def find_direction(fd: int) -> str:
    """Return the direction of a session, "incoming" or "outgoing", without changing the session.

    Raises:
        KernelTooOldError: the kernel is older than 7.2, so that the direction is unknown (EINVAL).
    """
    # The struct of the request below is longer than the kernel's, and its extra bytes are not all
    # zero, which the kernel refuses with E2BIG. Since Linux 7.2 it checks the direction of the
    # session first, so that only an incoming session returns E2BIG. Older kernels return E2BIG for
    # both directions; on them, `_read_name` raises.
    _read_name(fd)
    return "incoming" if _RETRIEVE_FD.errno_for_unknown_tail(fd) == errno.E2BIG else "outgoing"


def _check_token(token: int) -> None:
    if not 0 <= token < _TOKENS:
        raise ValueError(f"token {token}: a token is 0 to 2**64 - 1")
