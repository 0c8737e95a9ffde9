"""Handing over to another process, through a Unix socket.

The socket is a SOCK_SEQPACKET one: the kernel keeps packets apart, says when one was cut, and which
descriptors came with which.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, contextmanager, suppress
from errno import ENAMETOOLONG
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd, number_of
from pyluo.errors import HandoffError
from pyluo.handoff.conversation import Kind, open_conversation
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.received import Handoff
from pyluo.peer import MAX_FDS, Peer, same_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pyluo.descriptor import Descriptor

__all__ = ["connect", "listen", "receive", "send"]

_MAX_ADDRESS = 107  # bytes: sun_path, less the zero that ends it
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
    """Hands descriptors and a state over to the process that is in `receive` at the other end.

    Descriptors are duplicated: the caller's stay open, and stay the caller's. What they stand for
    has to be at rest before the call, since the state is of that moment.

    When this returns, the other process had everything, and was told to go on: what was handed
    over is its own, and this process must not drive it any more. It has its descriptors still, so
    that nothing is lost if the other process dies before it does anything with its own; be sure
    that it is dead before taking up again. When this raises a LuoError, `receive` raises too at the
    other end, and this process may go on as if nothing had been. An exception that is not of this
    call's making, such as that of a signal's handler, tells neither.

    Args:
        connection: a connected SOCK_SEQPACKET Unix socket. It can be used on afterwards, except
            that an error ends the connection.
        files: descriptors by name, in the order in which the receiver shall see them.
        state: what the receiver shall know besides.
        allow: whether to hand over to this process. It is asked about the one that made the other
            end of the socket, unless that was this process, as with socketpair(); and about the
            one that speaks there. Either might receive.
        timeout: seconds for which the other process may be silent; None for no limit.

    Returns:
        The process that has them now.

    Raises:
        ValueError: the socket is of another kind, a name is empty or longer than 255 bytes in
            UTF-8, or the timeout is not above zero.
        HandoffError: EPERM, `allow` said no; ETIMEDOUT; ECONNRESET, EPIPE or ENOTCONN, there is
            nobody at the other end, or no longer; EBADMSG or EPROTO, it answered nonsense;
            EPROTONOSUPPORT, it speaks another version; ETOOMANYREFS, too many descriptors of this
            user are on their way. With any other errno it is what the receiver refused with.
        LuoError: EBADF, a descriptor is not open; and as `Memfd.create` does. Nothing was sent
            then, and the connection is as it was.

    Source: unix(7), SCM_RIGHTS
    """
    _check_arguments(connection, timeout)
    numbers = [number_of(file) for file in files.values()]
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
    """Takes over what the process that is in `send` at the other end hands over.

    When this returns, the sender was told that everything is here, and has let go: what was handed
    over is this process's. When it raises, every descriptor that came is closed, and this process
    must not drive what it may have seen; the sender may go on with it. One case is left: if this
    process dies, or a signal's handler raises, between the sender's last word and the return, the
    sender has let go and nobody drives.

    Args:
        connection: as for `send`.
        allow: whether to take from this process; asked as for `send`.
        timeout: seconds for which the other process may be silent; None for no limit.
        max_files: descriptors that are taken at most.
        max_state: bytes of state that are taken at most.

    Raises:
        ValueError: the socket is of another kind, or the timeout is not above zero.
        HandoffError: EPERM, `allow` said no; ETIMEDOUT; ECONNRESET, EPIPE or ENOTCONN, there is
            nobody at the other end, or no longer; EBADMSG, what came is not what `send` sends;
            EPROTONOSUPPORT, it is of another version; E2BIG, it is more than the limits allow;
            EMFILE or ENFILE, the descriptors do not fit into this process (RLIMIT_NOFILE) or this
            system; EACCES, a security module let one of them not pass. With any other errno it is
            what the sender gave up with.

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
    """A listening socket with a name, for as long as the block lasts; accept() gives connections.

    Only the same user, and root, may connect.

    Args:
        path: in the file system; there must be nothing.
        timeout: seconds after which accept() raises TimeoutError; None for no limit.

    Raises:
        HandoffError: EADDRINUSE, there is something; ENOENT or EACCES, the folder; ENAMETOOLONG,
            over 107 bytes.

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
    """A connection to the process that listens at `path`, the caller's to close.

    Args:
        path: as for `listen`.

    Raises:
        HandoffError: ENOENT or ECONNREFUSED, nobody listens there; EACCES, somebody else does;
            EAGAIN, others wait to be accepted; ENAMETOOLONG.

    Source: unix(7)
    """
    connection = _socket()
    try:
        connection.setblocking(False)  # only for room in the listener's queue would it wait
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
            ENAMETOOLONG, operation, address, "A socket's path has 107 bytes at most"
        )
    with raising(operation, address):
        yield address


def _check_arguments(connection: socket.socket, timeout: float | None) -> None:
    if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ValueError(f"{connection!r} is no Unix socket of type SOCK_SEQPACKET")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"a timeout of {timeout} seconds: it has to be above zero")
