"""Handing over descriptors to another process through a Unix socket.

The socket must be of type SOCK_SEQPACKET, because with this type the kernel keeps packets and their
descriptors separate and reports truncated packets.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, contextmanager, suppress
from errno import ENAMETOOLONG
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd, fileno_to_share
from pyluo.errors import HandoffError
from pyluo.handoff.conversation import Kind, open_conversation
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.received import Handoff
from pyluo.peer import MAX_FDS, Peer, same_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pyluo.descriptor import Descriptor

__all__ = ["connect", "listen", "receive", "send"]

_MAX_ADDRESS = 107  # bytes, the size of sun_path without its terminating zero
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
    """Hand over descriptors and a state to the process that calls `receive` at the other end.

    The receiver gets duplicates, and the caller still owns its own descriptors. Stop using the
    files before the call, so that the state still describes them when the receiver takes over.

    When this function returns, the receiver has everything and may use the files; the caller must
    no longer use them. The caller still has its descriptors. So it can use the files again if the
    receiver dies, after making sure that the receiver is dead.

    If this function raises a LuoError, the caller may go on using the files, and `receive` raises
    at the other end too, unless this function raises before anything was sent (see the last entry
    under Raises). Any other exception, for example from a signal handler, does not tell whether the
    handoff succeeded.

    Args:
        connection: a connected SOCK_SEQPACKET Unix socket. The connection can be used again
            afterwards; if the call raises, the connection is shut down, unless the call raises
            before anything was sent (ValueError, or the last entry under Raises).
        files: a descriptor for each name, in the order in which the receiver gets them.
        state: any bytes for the receiver.
        allow: a function that returns whether a process may receive the handoff. It is called
            twice: for the process that created the other end of the socket (not if the caller
            created it, as with socketpair()), and for the process that sends packets from that end.
            Either could receive the descriptors.
        timeout: seconds to wait for each packet of the receiver; None for no limit.

    Returns:
        The process that received the handoff.

    Raises:
        ValueError: the socket has another family or type, a name is empty or longer than 255 bytes
            in UTF-8, or the timeout is not above zero.
        HandoffError: `allow` returned False (EPERM); the other process sent nothing in time
            (ETIMEDOUT); no process has the other end of the socket (ECONNRESET, EPIPE or ENOTCONN);
            the other process violated the protocol (EBADMSG or EPROTO) or uses another version of
            it (EPROTONOSUPPORT); too many descriptors of this user are in flight (ETOOMANYREFS).
            Any other errno is the receiver's reason for refusing.
        LuoError: a descriptor is not open (EBADF); memory of this process is mapped by its address
            in an iommufd (EBUSY); see also `Memfd.create`. In these cases nothing was sent, and the
            connection is unchanged.

    Source: unix(7), SCM_RIGHTS
    """
    _check_arguments(connection, timeout)
    numbers = [fileno_to_share(file, "send handoff") for file in files.values()]
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
    """Receive the descriptors and the state from the process that calls `send` at the other end.

    When this function returns, the sender has given up the files, and this process may use them. If
    this function raises, all received descriptors are closed, and this process must not use the
    files, because the sender may go on using them.

    One gap remains: after the sender has given up the files and before this function returns, this
    process may die or a signal handler may raise. Then neither process uses the files.

    Args:
        connection: see `send`.
        allow: a function that returns whether to accept a handoff from a process. It is called for
            the same processes as in `send`.
        timeout: seconds to wait for each packet of the sender; None for no limit.
        max_files: the largest number of descriptors to accept.
        max_state: the largest state to accept, in bytes.

    Raises:
        ValueError: the socket has another family or type, or the timeout is not above zero.
        HandoffError: `allow` returned False (EPERM); the other process sent nothing in time
            (ETIMEDOUT); no process has the other end of the socket (ECONNRESET, EPIPE or ENOTCONN);
            the other process violated the protocol (EBADMSG) or uses another version of it
            (EPROTONOSUPPORT); the handoff exceeds `max_files` or `max_state` (E2BIG); this process
            (EMFILE, see RLIMIT_NOFILE) or the system (ENFILE) has too many open files; a security
            module blocked a descriptor (EACCES). Any other errno is the sender's reason for giving
            up.

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
    """Yield a listening socket; close the socket and remove its path after the ``with`` block.

    The socket's accept() returns connections for `send` and `receive`. Only processes of the same
    user or of root can connect.

    Args:
        path: the path of the socket; no file of this name may exist.
        timeout: seconds after which accept() raises TimeoutError; None for no limit.

    Raises:
        HandoffError: a file of this name exists (EADDRINUSE); the folder does not exist (ENOENT) or
            cannot be written to (EACCES); the path is longer than 107 bytes (ENAMETOOLONG).

    Source: unix(7)
    """
    with _socket() as listener:
        with _socket_address("listen for handoff", path) as address:
            os.fchmod(listener.fileno(), 0o600)  # bind() creates the path with this mode
            listener.bind(address)
        try:
            listener.listen(1)
            listener.settimeout(timeout)
            yield listener
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """Return a connection to the process that listens at `path`; the caller must close it.

    Args:
        path: the path that the other process passed to `listen`.

    Raises:
        HandoffError: no process listens at the path (ENOENT or ECONNREFUSED); the process belongs
            to another user (EACCES); too many connections are waiting to be accepted (EAGAIN); the
            path is longer than 107 bytes (ENAMETOOLONG).

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
