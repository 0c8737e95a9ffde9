"""Handing over descriptors to another process through a Unix socket.

The socket must be of type SOCK_SEQPACKET, because with this type the kernel keeps packets and their
descriptors separate and reports truncated packets.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress
from errno import EADDRINUSE, EAGAIN, EBUSY, ENAMETOOLONG
from typing import TYPE_CHECKING

from pyluo.errors import HandoffError
from pyluo.handoff.conversation import TIMEOUT, Conversation, check_socket
from pyluo.handoff.machine import Owner, Phase
from pyluo.handoff.receiver import Receiver
from pyluo.handoff.sender import Sender
from pyluo.operation import Operation
from pyluo.peer import same_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pyluo.descriptor import Descriptor
    from pyluo.handoff.received import Handoff
    from pyluo.peer import Peer

__all__ = [
    "Receiving",
    "Sending",
    "connect",
    "listen",
    "receive",
    "receive_async",
    "send",
    "send_async",
]

_MAX_ADDRESS = 107  # bytes, the size of sun_path without its terminating zero
_CONNECT = Operation(
    "connect for handoff",
    HandoffError,
    {EAGAIN: "Other connections are waiting to be accepted there: try again"},
)
_LISTEN = Operation(
    "listen for handoff",
    HandoffError,
    {
        EADDRINUSE: (
            "A process listens there, or another kind of file or another user's socket is there"
        ),
        EAGAIN: (
            "Another process keeps a lock on the folder: find it by `fuser`, or choose another "
            "folder"
        ),
    },
)
_MAX_FILES = 1 << 16
_MAX_STATE = 1 << 28


class Sending(Conversation):
    """A handoff to the process that calls `receive` at the other end of a connection.

    The receiver gets duplicates, and the caller still owns its own descriptors, which must stay
    open until the handoff is decided. Stop using the files before `send`, so that the state still
    describes them when the receiver takes over.

    Whatever happens, `owner` says who may use the files: an exception of any kind, also one that a
    signal handler raises, can come at any line. The same call again goes on after it.

    Args:
        connection: a connected SOCK_SEQPACKET Unix socket. It can be used again after a handoff
            that succeeded. After one that failed, it is shut down.
        files: a descriptor for each name, in the order in which the receiver gets them.
        state: any bytes for the receiver.
        allow: a function that returns whether a process may receive the handoff. It is called for
            the process that created the other end of the socket (not if the caller created it, as
            with socketpair()), and for the process that sends packets from that end. Either could
            receive the descriptors.

    Raises:
        ValueError: the socket has another family or type, or a name is empty or longer than 255
            bytes in UTF-8.
        HandoffError: this process has too many open files (EMFILE).
        RequestError: a descriptor is not open (EBADF); see also `Memfd.create`.
    """

    _machine: Sender

    def __init__(
        self,
        connection: socket.socket,
        files: Mapping[str, Descriptor | int],
        state: bytes = b"",
        *,
        allow: Callable[[Peer], bool] = same_user,
    ) -> None:
        check_socket(connection)
        machine = Sender(files, state, allow)
        try:
            super().__init__(machine, connection)
        except BaseException:
            machine.close()
            raise

    def send(self, *, timeout: float | None = TIMEOUT, deadline: float | None = None) -> Peer:
        """Hand over, and return the process that has the files now.

        When this returns, the receiver has everything and may use the files; the caller must not.

        Args:
            timeout: seconds to wait for each packet of the receiver; None for no limit.
            deadline: seconds for the handoff as a whole; None for no limit.

        Raises:
            ValueError: a time is not above zero.
            HandoffError: the files are still the caller's, unless `unfinished` is set. Then the
                receiver may use them, and has not said whether it does (ETIMEDOUT): the same call
                again waits for it, `take_back` for its death, and `concede` ends the doubt.
                `allow` returned False (EPERM); the other process sent nothing in time (ETIMEDOUT);
                no process has the other end of the socket, or the receiver died before it took the
                files over (ECONNRESET, EPIPE or ENOTCONN); the other process violated the protocol
                (EBADMSG or EPROTO) or uses another version of it (EPROTONOSUPPORT); too many
                descriptors of this user are in flight (ETOOMANYREFS). Any other errno is the
                receiver's reason for refusing.

        Source: unix(7), SCM_RIGHTS
        """
        self._run(timeout, deadline)
        return self._receiver

    async def send_async(
        self, *, timeout: float | None = TIMEOUT, deadline: float | None = None
    ) -> Peer:
        """Hand over in the running asyncio event loop; see `send`."""
        await self._run_async(timeout, deadline)
        return self._receiver

    @property
    def _receiver(self) -> Peer:
        assert self._machine.peer is not None
        return self._machine.peer

    def take_back(self, *, timeout: float | None = TIMEOUT) -> None:
        """Wait until the files are known to be the caller's, because the receiver is dead.

        Args:
            timeout: seconds to wait; None for no limit.

        Raises:
            ValueError: the time is not above zero.
            HandoffError: the receiver has taken the files over (EBUSY); or it lives, and has still
                not said whether it has, so that the caller must not use them (`unfinished` is set).
        """
        self._give_up()
        try:
            self._run(timeout, None, patient=True)
        except HandoffError:
            if self.owner is not Owner.SENDER:
                raise
        self._refuse_taken()

    async def take_back_async(self, *, timeout: float | None = TIMEOUT) -> None:
        """Wait in the running asyncio event loop; see `take_back`."""
        self._give_up()
        try:
            await self._run_async(timeout, None, patient=True)
        except HandoffError:
            if self.owner is not Owner.SENDER:
                raise
        self._refuse_taken()

    def concede(self) -> None:
        """Leave the files to a receiver that has not said whether it took them.

        If the handoff was not undecided in this way, this does nothing.
        """
        self._machine.concede()
        if self._machine.phase is Phase.DONE:
            self._close()

    def _refuse_taken(self) -> None:
        if self.owner is Owner.RECEIVER:
            hint = "It has taken the files over, and may have handed them on"
            raise HandoffError(EBUSY, self._machine.operation.name, self._machine.subject, hint)


class Receiving(Conversation):
    """A handoff from the process that calls `send` at the other end of a connection.

    Whatever happens, `owner` says who may use the files: an exception of any kind, also one that a
    signal handler raises, can come at any line. The same call again goes on after it, and returns
    the same `Handoff` if it is complete. `abandon` leaves the files to the sender.

    If the object is dropped before that, it abandons the handoff; but if the sender is dead, the
    descriptors that have come stay open, because they may be the last ones of their files.

    Args:
        connection: see `Sending`.
        allow: a function that returns whether to accept a handoff from a process. It is called for
            the same processes as in `Sending`.
        max_files: the largest number of descriptors to accept.
        max_state: the largest state to accept, in bytes.

    Raises:
        ValueError: the socket has another family or type.
        HandoffError: this process has too many open files (EMFILE).
    """

    _machine: Receiver

    def __init__(
        self,
        connection: socket.socket,
        *,
        allow: Callable[[Peer], bool] = same_user,
        max_files: int = _MAX_FILES,
        max_state: int = _MAX_STATE,
    ) -> None:
        check_socket(connection)
        super().__init__(Receiver(allow, max_files, max_state), connection)

    def receive(self, *, timeout: float | None = TIMEOUT, deadline: float | None = None) -> Handoff:
        """Receive the descriptors and the state.

        When this returns, the sender has given up the files, and this process may use them.

        Args:
            timeout: seconds to wait for each packet of the sender; None for no limit.
            deadline: seconds for the handoff as a whole; None for no limit.

        Raises:
            ValueError: a time is not above zero.
            HandoffError: the files are the sender's, and the descriptors that have come are closed,
                unless `unfinished` is set. Then the sender has hung up without a word (ECONNRESET),
                and `take_over` can take over what has come.
                `allow` returned False (EPERM); the other process sent nothing in time (ETIMEDOUT);
                no process has the other end of the socket (ECONNRESET, EPIPE or ENOTCONN); the
                other process violated the protocol (EBADMSG) or uses another version of it
                (EPROTONOSUPPORT); the handoff exceeds `max_files` or `max_state` (E2BIG); this
                process (EMFILE, see RLIMIT_NOFILE) or the system (ENFILE) has too many open files;
                a security module blocked a descriptor (EACCES). Any other errno is the sender's
                reason for giving up.

        Source: unix(7), SCM_RIGHTS; recvmsg(2), MSG_CMSG_CLOEXEC, MSG_CTRUNC
        """
        self._run(timeout, deadline)
        return self._handoff

    async def receive_async(
        self, *, timeout: float | None = TIMEOUT, deadline: float | None = None
    ) -> Handoff:
        """Receive in the running asyncio event loop; see `receive`."""
        await self._run_async(timeout, deadline)
        return self._handoff

    @property
    def _handoff(self) -> Handoff:
        assert self._machine.taken is not None
        return self._machine.taken

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of the descriptors that were announced and have not come."""
        return self._machine.missing

    def take_over(self, *, timeout: float | None = TIMEOUT, partial: bool = False) -> Handoff:
        """Take over what a sender has sent that died before it could give the files up.

        The sender may also have hung up in another way, or may be dying: this waits until the
        kernel says, by a pidfd, that all of its threads have ended. A sender that decides to keep
        the files says so; if it did, they cannot be taken over.

        Args:
            timeout: seconds to wait; None for no limit.
            partial: whether to take over although some descriptors have not come; see `missing`.

        Raises:
            ValueError: the time is not above zero.
            HandoffError: the sender lives (ETIMEDOUT); some descriptors have not come (ENODATA);
                this kernel cannot prove the death of the sender (EOPNOTSUPP): see the manual. In
                these cases `unfinished` is set, and everything is as before. See also `receive`.

        Source: pidfd_open(2); unix(7), SO_PASSPIDFD (Linux 6.5)
        """
        if not self._is_broken:
            try:
                return self.receive(timeout=timeout)
            except HandoffError:
                if not self._is_broken:
                    raise
        self._claim(partial)
        try:
            self._run(timeout, None)
        finally:
            self._machine.unclaim()
        return self._handoff

    async def take_over_async(
        self, *, timeout: float | None = TIMEOUT, partial: bool = False
    ) -> Handoff:
        """Take over in the running asyncio event loop; see `take_over`."""
        if not self._is_broken:
            try:
                return await self.receive_async(timeout=timeout)
            except HandoffError:
                if not self._is_broken:
                    raise
        self._claim(partial)
        try:
            await self._run_async(timeout, None)
        finally:
            self._machine.unclaim()
        return self._handoff

    @property
    def _is_broken(self) -> bool:
        return self._machine.phase is Phase.BROKEN

    def _claim(self, partial: bool) -> None:
        try:
            self._require_proof()
            self._machine.claim(partial=partial)
        except HandoffError as error:
            error.unfinished = self
            raise

    def _drop(self, error: BaseException | None = None) -> None:
        if self._machine.has_received and self._peer_is_dead():
            self._machine.leave_open()
        super()._drop(error)


def send(
    connection: socket.socket,
    files: Mapping[str, Descriptor | int],
    state: bytes = b"",
    *,
    allow: Callable[[Peer], bool] = same_user,
    timeout: float | None = TIMEOUT,
    deadline: float | None = None,
) -> Peer:
    """Hand over descriptors and a state to the process that calls `receive` at the other end.

    This is `Sending.send` for callers whose signal handlers raise nothing: such an exception does
    not tell whether the handoff succeeded, unless the caller has the `Sending`. See there for the
    arguments and the errors.
    """
    sending = Sending(connection, files, state, allow=allow)
    try:
        return sending.send(timeout=timeout, deadline=deadline)
    except BaseException as error:
        sending.stop(error)
        raise


async def send_async(
    connection: socket.socket,
    files: Mapping[str, Descriptor | int],
    state: bytes = b"",
    *,
    allow: Callable[[Peer], bool] = same_user,
    timeout: float | None = TIMEOUT,
    deadline: float | None = None,
) -> Peer:
    """Hand over in the running asyncio event loop; see `send`. A cancellation is an exception."""
    sending = Sending(connection, files, state, allow=allow)
    try:
        return await sending.send_async(timeout=timeout, deadline=deadline)
    except BaseException as error:
        sending.stop(error)
        raise


def receive(
    connection: socket.socket,
    *,
    allow: Callable[[Peer], bool] = same_user,
    timeout: float | None = TIMEOUT,
    deadline: float | None = None,
    max_files: int = _MAX_FILES,
    max_state: int = _MAX_STATE,
) -> Handoff:
    """Receive the descriptors and the state from the process that calls `send` at the other end.

    This is `Receiving.receive` for callers whose signal handlers raise nothing: after such an
    exception the files are the sender's, unless it came after the last packet; then the descriptors
    are closed. See there for the arguments and the errors.
    """
    receiving = Receiving(connection, allow=allow, max_files=max_files, max_state=max_state)
    try:
        return receiving.receive(timeout=timeout, deadline=deadline)
    except BaseException as error:
        receiving.stop(error)
        raise


async def receive_async(
    connection: socket.socket,
    *,
    allow: Callable[[Peer], bool] = same_user,
    timeout: float | None = TIMEOUT,
    deadline: float | None = None,
    max_files: int = _MAX_FILES,
    max_state: int = _MAX_STATE,
) -> Handoff:
    """Receive in the running asyncio event loop; see `receive`. A cancellation is an exception."""
    receiving = Receiving(connection, allow=allow, max_files=max_files, max_state=max_state)
    try:
        return await receiving.receive_async(timeout=timeout, deadline=deadline)
    except BaseException as error:
        receiving.stop(error)
        raise


@contextmanager
def listen(
    path: str | os.PathLike[str], *, timeout: float | None = TIMEOUT, backlog: int = 1
) -> Iterator[socket.socket]:
    """Yield a listening socket; close the socket and remove its path after the ``with`` block.

    The socket's accept() returns connections for `send` and `receive`. Only processes of the same
    user or of root can connect.

    If a listener of this user was killed, its path is taken over. The path of anybody who lives is
    left alone, now and at the end of the block; listeners that begin or end together take turns,
    by a lock on the folder.

    Args:
        path: the path of the socket.
        timeout: seconds after which accept() raises TimeoutError; None for no limit. 0 makes
            accept() raise BlockingIOError instead of waiting, as asyncio needs it.
            The lock on the folder is waited for 10 seconds at most.
        backlog: how many connections may wait to be accepted.

    Raises:
        HandoffError: a process listens at the path, or a file of another kind or of another user is
            there (EADDRINUSE); the folder does not exist (ENOENT), or cannot be read and written
            to (EACCES); another process holds the lock on the folder (EAGAIN); the path is longer
            than 107 bytes (ENAMETOOLONG).

    Source: unix(7); flock(2)
    """
    address = _address(_LISTEN, path)
    with _socket() as listener:
        with _LISTEN.raising(address):
            os.fchmod(listener.fileno(), 0o600)  # bind() creates the path with this mode
            with _folder_lock(address):
                _remove_dead_socket(address)
                listener.bind(address)
                own = os.lstat(address)
                listener.listen(backlog)
        try:
            listener.settimeout(timeout)
            yield listener
        finally:
            with suppress(OSError), _folder_lock(address):
                # The open socket keeps its inode, so that no other file can have the same number.
                if os.path.samestat(own, os.lstat(address)):
                    os.unlink(address)


@contextmanager
def _folder_lock(address: str) -> Iterator[None]:
    """Let only one process at a time create or remove sockets in a folder.

    Raises:
        OSError: the folder cannot be opened; or another process keeps the lock (EAGAIN).
    """
    folder = os.open(os.path.dirname(address) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)


def _remove_dead_socket(address: str) -> None:
    """Remove a socket of this user that nobody has open any more."""
    try:
        status = os.lstat(address)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        return  # bind() refuses
    # A socket of another type than those that handoffs use: if the path belongs to a living one of
    # those, the kernel says so, and does not connect. So nobody notices that it was tried.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
        except OSError:
            pass  # it lives, or one cannot tell


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
        address = _address(_CONNECT, path)
        with _CONNECT.raising(address):
            connection.connect(address)
        connection.setblocking(True)
    except BaseException:
        connection.close()
        raise
    return connection


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _address(operation: Operation, path: str | os.PathLike[str]) -> str:
    address = os.fspath(path)
    if len(os.fsencode(address)) > _MAX_ADDRESS:
        raise HandoffError(
            ENAMETOOLONG, operation.name, address, "A socket's path has at most 107 bytes"
        )
    return address
