"""Handing over to another process through a Unix socket.

The socket must be of type SOCK_SEQPACKET: the kernel keeps the packets and their descriptors apart,
and reports truncated packets.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, contextmanager, suppress
from errno import ENAMETOOLONG
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd, fileno_of
from pyluo.errors import HandoffError
from pyluo.handoff.conversation import Kind, open_conversation
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.received import Handoff
from pyluo.peer import MAX_FDS, Peer, same_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pyluo.descriptor import Descriptor

__all__ = ["connect", "listen", "receive", "send"]

_MAX_ADDRESS = 107  # bytes: sun_path without its terminating zero
_TIMEOUT = 10.0
_MAX_FILES = 1 << 16
_MAX_STATE = 1 << 28


def send(
    connection: socket.socket,
    files: Mapping[str, Descriptor | int],
    state: bytes = b"",
    *,
    allow: Callable[[Peer], bool] = same_user,
    timeout: float | None = _TIMEOUT,
) -> Peer:
    """Hand descriptors and a state over to the process that is in `receive` at the other end.

    Descriptors are duplicated: the caller still owns its own. Stop using the files before the call,
    so that the state still describes them when the other process takes over.

    When this returns, the other process has everything and was told to continue: it owns what was
    handed over, and this process must not drive it any more. This process still has its
    descriptors, so nothing is lost if the other process dies before it uses its own; make sure that
    it is dead before driving the files again. If this raises a LuoError, `receive` raises too at
    the other end, and this process may continue as if nothing had happened. An exception from
    elsewhere, such as a signal handler, does not tell whether the handoff succeeded.

    Args:
        connection: a connected SOCK_SEQPACKET Unix socket. It can still be used afterwards, unless
            the call raises, which ends the connection.
        files: descriptors by name, in the order in which the receiver gets them.
        state: any data for the receiver.
        allow: a function that returns whether to hand over to a process. It is called for the
            process that created the other end of the socket, unless that is this process, as with
            socketpair(); and for the process that sends packets there. Either could receive.
        timeout: seconds to wait for each packet of the other process; None for no limit.

    Returns:
        The process that received the handoff.

    Raises:
        ValueError: the socket has another family or type, a name is empty or longer than 255 bytes
            in UTF-8, or the timeout is not above zero.
        HandoffError: `allow` returned False (EPERM); the other process sent nothing in time
            (ETIMEDOUT); there is no process at the other end, or no longer (ECONNRESET, EPIPE or
            ENOTCONN); it broke the protocol (EBADMSG or EPROTO) or uses another version of it
            (EPROTONOSUPPORT); too many descriptors of this user are in flight (ETOOMANYREFS). Any
            other errno is the reason why the receiver refused.
        LuoError: a descriptor is not open (EBADF); see also `Memfd.create`. Nothing was sent
            then, and the connection is unchanged.

    Source: unix(7), SCM_RIGHTS
    """
    _check_arguments(connection, timeout)
    numbers = [fileno_of(file) for file in files.values()]
    entries = []
    for name, number in zip(files, numbers, strict=True):
        with raising("fstat", f"descriptor {number}"):
            entries.append(Entry.of(name, number))
    with (
        Manifest(tuple(entries), state).to_memfd() as manifest,
        open_conversation(connection, "send handoff", allow, timeout) as conversation,
    ):
        conversation.expect(Kind.READY, 0)
        conversation.send(Kind.OFFER, len(numbers), [manifest.fileno()])
        for first in range(0, len(numbers), MAX_FDS):
            conversation.expect(Kind.WANT, first)
            conversation.send(Kind.FILES, first, numbers[first : first + MAX_FDS])
        conversation.expect(Kind.COMPLETE, len(numbers))
        conversation.send(Kind.COMMIT, len(numbers))
        return conversation.peer


def receive(
    connection: socket.socket,
    *,
    allow: Callable[[Peer], bool] = same_user,
    timeout: float | None = _TIMEOUT,
    max_files: int = _MAX_FILES,
    max_state: int = _MAX_STATE,
) -> Handoff:
    """Receive what the process that is in `send` at the other end hands over.

    When this returns, the sender knows that everything arrived and has committed the handoff: this
    process owns what was handed over. If this raises, every received descriptor is closed, and this
    process must not drive the files, because the sender may continue with them. One gap remains: if
    this process dies, or a signal handler raises, after the sender's commit and before the return,
    the sender has given the files up and no process drives them.

    Args:
        connection: see `send`.
        allow: a function that returns whether to receive from a process; called as for `send`.
        timeout: seconds to wait for each packet of the other process; None for no limit.
        max_files: the largest number of descriptors to accept.
        max_state: the largest state to accept, in bytes.

    Raises:
        ValueError: the socket has another family or type, or the timeout is not above zero.
        HandoffError: `allow` returned False (EPERM); the other process sent nothing in time
            (ETIMEDOUT); there is no process at the other end, or no longer (ECONNRESET, EPIPE or
            ENOTCONN); it broke the protocol (EBADMSG) or uses another version of it
            (EPROTONOSUPPORT); the handoff exceeds a limit (E2BIG); this process (EMFILE, see
            RLIMIT_NOFILE) or the system (ENFILE) has no room for the descriptors; a security module
            blocked one of them (EACCES). Any other errno is the reason why the sender gave up.

    Source: unix(7), SCM_RIGHTS; recvmsg(2), MSG_CMSG_CLOEXEC, MSG_CTRUNC
    """
    _check_arguments(connection, timeout)
    with (
        open_conversation(connection, "receive handoff", allow, timeout) as conversation,
        ExitStack() as stack,
    ):
        conversation.send(Kind.READY)
        count, (offered,) = conversation.expect(Kind.OFFER, fds=1)
        with offered:
            manifest = Manifest.read(offered.fileno(), max_files=max_files, max_state=max_state)
        if count != len(manifest.entries):
            raise conversation.protocol_error(
                f"{count} descriptors, and a manifest of {len(manifest.entries)}"
            )
        files: dict[str, OwnedFd] = {}
        for first in range(0, count, MAX_FDS):
            batch = manifest.entries[first : first + MAX_FDS]
            conversation.send(Kind.WANT, first)
            _, fds = conversation.expect(Kind.FILES, first, fds=len(batch))
            for fd in fds:
                stack.enter_context(fd)
            for entry, fd in zip(batch, fds, strict=True):
                if not entry.matches(fd.fileno()):
                    raise conversation.protocol_error(
                        f"{entry.name!r} is of another file than announced"
                    )
                files[entry.name] = fd
        conversation.send(Kind.COMPLETE, count)
        conversation.expect_commit(count)
        stack.pop_all()
        return Handoff(files, manifest.state, conversation.peer)


@contextmanager
def listen(
    path: str | os.PathLike[str], *, timeout: float | None = _TIMEOUT
) -> Iterator[socket.socket]:
    """Return a listening socket, whose path exists until the end of a ``with`` block.

    Its accept() returns connections for `send` and `receive`. Only the same user and root may
    connect.

    Args:
        path: the path of the socket, where no file may exist.
        timeout: seconds after which accept() raises TimeoutError; None for no limit.

    Raises:
        HandoffError: a file exists there (EADDRINUSE); the folder does not exist (ENOENT) or cannot
            be written to (EACCES); the path is longer than 107 bytes (ENAMETOOLONG).

    Source: unix(7)
    """
    with _socket() as listener:
        with _socket_address("listen for handoff", path) as address:
            os.fchmod(listener.fileno(), 0o600)  # bind() gives this mode to the name
            listener.bind(address)
        try:
            listener.listen(1)
            listener.settimeout(timeout)
            yield listener
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """Connect to the process that listens at `path`; the caller must close the connection.

    Args:
        path: see `listen`.

    Raises:
        HandoffError: no process listens there (ENOENT or ECONNREFUSED); a process of another user
            does (EACCES); other connections wait to be accepted (EAGAIN); the path is longer than
            107 bytes (ENAMETOOLONG).

    Source: unix(7)
    """
    connection = _socket()
    try:
        connection.setblocking(False)  # fail instead of waiting for room in the listener's queue
        with _socket_address("connect for handoff", path) as address:
            connection.connect(address)
        connection.setblocking(True)
    except BaseException:
        connection.close()
        raise
    return connection


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextmanager
def _socket_address(operation: str, path: str | os.PathLike[str]) -> Iterator[str]:
    address = os.fspath(path)
    if len(os.fsencode(address)) > _MAX_ADDRESS:
        raise HandoffError(
            ENAMETOOLONG, operation, address, "A socket's path has at most 107 bytes"
        )
    with raising(operation, address):
        yield address


def _check_arguments(connection: socket.socket, timeout: float | None) -> None:
    if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ValueError(f"{connection!r} is not a Unix socket of type SOCK_SEQPACKET")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"a timeout of {timeout} seconds: it must be above zero")
