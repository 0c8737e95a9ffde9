"""Holders: processes whose only task is to keep a session open, even after the session's creator
has ended.

A holder listens on a Unix socket in a folder that only its user may enter. It accepts requests from
its own user and from root. To the request `session` it sends a duplicate of the session's
descriptor; after the request `release` it ends. A holder survives the end of its parent and the
hang-up of the terminal. The jump ends the process; live update preserves an outgoing session for
the next kernel.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, ECHILD, ECONNREFUSED, EEXIST, ENOENT, EPROTO
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.errors import LuoError, LuoPermissionError
from pyluo.liveupdate import LiveUpdate
from pyluo.peer import peer_credentials, same_user
from pyluo.session import IncomingSession, OutgoingSession

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Holder", "find", "hold", "retrieve"]

_SESSION, _RELEASE, _KEEP = b"session", b"release", b"keep"
# In seconds. _ANSWER_TIMEOUT exceeds _REQUEST_TIMEOUT, so that a client that sends nothing cannot
# make other clients time out.
_REQUEST_TIMEOUT = 1.0
_ANSWER_TIMEOUT = 10.0
_START_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a session open.

    Attributes:
        name: the name of the session.
        direction: the direction of the session, "incoming" or "outgoing".
        pid: the PID of the process.
    """

    name: str
    direction: str
    pid: int

    def session(self) -> OutgoingSession | IncomingSession:
        """Return an object with a duplicate of the session's descriptor.

        The holder still has the session open.

        Raises:
            LuoError: the holder has ended (ENOENT, ECONNREFUSED), or sent no session (EPROTO).
        """
        with _connect(self.name, self.direction) as connection, raising("ask holder", str(self)):
            connection.send(_SESSION)
            _, fds, _, _ = socket.recv_fds(connection, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise LuoError(EPROTO, "ask holder", str(self), "It sent no session")
        return _wrap_session(fds[0], self.direction)

    def release(self) -> None:
        """End the holder, and with it the session unless another process has the session open.

        Raises:
            LuoError: see `session`.
        """
        with _connect(self.name, self.direction) as connection, raising("ask holder", str(self)):
            connection.settimeout(None)  # it can take long to free much memory
            connection.send(_RELEASE)
            connection.recv(64)  # returns when the holder has closed the session

    def __str__(self) -> str:
        return f"process {self.pid}, which holds {self.direction} session {self.name!r}"


def hold(session: OutgoingSession) -> Holder:
    """Start a process that holds an outgoing session open; the caller's object stays open too.

    Raises:
        LuoError: this session has a holder already (EEXIST); the new process did not start
            (ECHILD), or not in time (ETIMEDOUT). In the last two cases no holder remains.
    """
    with raising("dup", f"session {session.name!r}"):
        fd = os.dup(session.fileno())
    try:
        return _start(session.name, "outgoing", fd)
    finally:
        os.close(fd)


def retrieve(name: str) -> Holder:
    """Start a process that retrieves an incoming session and holds it open.

    Raises:
        LuoError: this session has a holder already (EEXIST); the new process did not start
            (ECHILD), or not in time (ETIMEDOUT); see also `LiveUpdate.retrieve_session`.
    """
    return _start(name, "incoming", -1)


def find(name: str, direction: str) -> Holder | None:
    """Return the holder of a session; None if the session has no holder.

    Raises:
        LuoPermissionError: the folder of the sockets, or the holder, belongs to another user
            (EACCES).
    """
    try:
        with _connect(name, direction) as connection:
            return Holder(name, direction, peer_credentials(connection).pid)
    except LuoError as error:
        if error.errno not in (ENOENT, ECONNREFUSED):
            raise
    return None


def _folder() -> str:
    """Return the folder of the sockets, which only its owner may enter; create it if necessary."""
    if os.geteuid() == 0:
        folder = "/run/pyluo"
    else:
        folder = os.path.join(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", f"pyluo-{os.geteuid()}")
    with raising("make folder", folder), suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    own_folder = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not own_folder or stat.S_IMODE(status.st_mode) & 0o077:
        raise LuoPermissionError(
            EACCES, "use folder", folder, "It must be your own folder, of mode 0700"
        )
    return folder


def _address(name: str, direction: str) -> str:
    """Return the path of a holder's socket.

    The path contains a digest of the session's name, because a name can contain slashes and be too
    long for a socket path.
    """
    digest = hashlib.blake2b(os.fsencode(name), digest_size=12).hexdigest()
    return os.path.join(_folder(), f"{digest}-{direction}")


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _connect(name: str, direction: str) -> socket.socket:
    """Return a connection to the holder of a session, after checking the holder's user."""
    address = _address(name, direction)
    connection = _socket()
    try:
        connection.settimeout(_ANSWER_TIMEOUT)
        with raising("connect", f"the holder of {direction} session {name!r}"):
            connection.connect(address)
            listener = peer_credentials(connection)
        if not same_user(listener):
            raise LuoPermissionError(EACCES, "connect", address, "Another user listens there")
    except BaseException:
        connection.close()
        raise
    return connection


def _start(name: str, direction: str, fd: int) -> Holder:
    """Start a process that runs this module, and wait until it holds the session.

    `fd` is the descriptor of an outgoing session, or -1 to retrieve an incoming one.
    """
    address = _address(name, direction)
    with _start_lock() as lock, ExitStack() as stack:
        if (found := find(name, direction)) is not None:
            raise LuoError(EEXIST, "start holder", str(found), "Release it first")
        with suppress(FileNotFoundError):
            os.unlink(address)  # left by a holder that was killed
        parent_end, child_end = map(
            stack.enter_context, socket.socketpair(type=socket.SOCK_SEQPACKET)
        )
        stderr = stack.enter_context(tempfile.TemporaryFile())
        numbers = child_end.fileno(), lock, fd
        command = [sys.executable, "-m", "pyluo.holder", *map(str, numbers), address, name]
        # The process starts in "/", so relative paths must become absolute.
        path = [os.path.abspath(entry) for entry in sys.path]
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            cwd="/",
            pass_fds=[number for number in numbers if number >= 0],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        process.wait()  # the process forks and ends; its child becomes the holder
        child_end.close()
        parent_end.settimeout(_START_TIMEOUT)
        with raising("start holder", f"session {name!r}"):
            answer = parent_end.recv(1 << 16)
        if not answer:
            stderr.seek(0)
            hint = stderr.read().decode(errors="replace").strip()
            raise LuoError(ECHILD, "start holder", f"session {name!r}", hint)
        # Unpickling is safe: the answer comes from the child, over a private pair of sockets.
        pid_or_error = pickle.loads(answer)
        if isinstance(pid_or_error, LuoError):
            raise pid_or_error
        with raising("start holder", f"session {name!r}"):
            parent_end.send(_KEEP)
        return Holder(name, direction, pid_or_error)


@contextmanager
def _start_lock() -> Iterator[int]:
    """Let only one process at a time start a holder; yield the descriptor of the lock file.

    Without the lock, two holders that start together could replace each other's socket. The lock
    lasts until the last duplicate of its descriptor is closed. The new holder inherits a duplicate,
    so that the lock lasts until the holder has started, even if the process that started it ends
    first.
    """
    with open(os.path.join(_folder(), "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _main() -> None:
    """Run the holder: report to the process that started it, then serve until the release."""
    channel, lock, fd = map(int, sys.argv[1:4])
    address, name = sys.argv[4:]
    if os.fork():
        # The starter waits for this process. The child becomes the holder, for which the starter
        # need not wait.
        os._exit(0)
    with socket.socket(fileno=channel) as starter:
        try:
            listener = _listen(address)
        except LuoError as error:
            starter.send(pickle.dumps(error))
            return
        try:
            # After the next line nothing may fail: if this process ends, so does the session.
            session = _obtain_session(fd, name)
        except LuoError as error:
            os.unlink(address)
            starter.send(pickle.dumps(error))
            return
        _daemonize()
        os.close(lock)
        starter_confirmed = _starter_confirms(starter)
    releasing_connection = _serve(listener, session) if starter_confirmed or fd < 0 else None
    with suppress(OSError):
        os.unlink(address)
    os.close(session.detach())
    if releasing_connection is not None:
        releasing_connection.close()  # last, because the process at its other end waits for this


def _starter_confirms(starter: socket.socket) -> bool:
    """Send this holder's PID to the process that started it.

    Returns:
        Whether that process answered that it wants to keep the holder.
    """
    try:
        starter.send(pickle.dumps(os.getpid()))
        return starter.recv(64) == _KEEP
    except OSError:
        return False


def _listen(address: str) -> socket.socket:
    listener = _socket()
    with raising("listen", address):
        listener.bind(address)
        listener.listen()
    return listener


def _obtain_session(fd: int, name: str) -> OutgoingSession | IncomingSession:
    """Return the outgoing session of a descriptor; retrieve the incoming session if `fd` is -1."""
    if fd >= 0:
        return _wrap_session(fd, "outgoing")
    with LiveUpdate() as device:
        return device.retrieve_session(name)


def _wrap_session(fd: int, direction: str) -> OutgoingSession | IncomingSession:
    """Return an object that owns a session's descriptor; close the descriptor if that fails.

    The caller passes the direction, because older kernels cannot report it.
    """
    kind = IncomingSession if direction == "incoming" else OutgoingSession
    try:
        return kind.from_fd(fd, trusted=True)
    except BaseException:
        os.close(fd)
        raise


def _daemonize() -> None:
    """Protect this process from hang-ups and the OOM killer, and detach it from the terminal.

    SIGHUP is ignored, the standard streams are redirected to /dev/null, and the process is renamed
    to pyluo-holder.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with suppress(OSError), open(os.devnull, "r+b", buffering=0) as null:
        for number in (0, 1, 2):
            os.dup2(null.fileno(), number)
    with suppress(OSError):
        with open("/proc/self/comm", "w") as file:
            file.write("pyluo-holder")
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")


def _serve(listener: socket.socket, session: OutgoingSession | IncomingSession) -> socket.socket:
    """Serve requests until one asks to release the session; return the connection it came from."""
    while True:
        try:
            connection, _ = listener.accept()
        except (OSError, MemoryError):  # the system lacks resources: try again later
            time.sleep(1)
            continue
        with suppress(OSError, MemoryError):
            connection.settimeout(_REQUEST_TIMEOUT)
            allowed = same_user(peer_credentials(connection))
            request = connection.recv(64) if allowed else b""
            if request == _RELEASE:
                return connection
            if request == _SESSION:
                socket.send_fds(connection, [_SESSION], [session.fileno()])
        connection.close()


if __name__ == "__main__":
    _main()
