"""A process that does nothing but hold a session, so that the session outlives who made it.

It listens on a socket in a folder that only its user may enter, and answers that user and root:
`session` is answered with a duplicate of the descriptor, `release` ends it. It survives its
parent, and the terminal's hang-up; a jump ends it, after the session has gone over.
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
# In seconds. Others wait longer for an answer than a client that says nothing can take up.
_REQUEST_TIMEOUT = 1.0
_ANSWER_TIMEOUT = 10.0
_START_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A holder process, as others see it.

    Attributes:
        name: of the session.
        direction: of the session, "incoming" or "outgoing".
        pid: of the process.
    """

    name: str
    direction: str
    pid: int

    def session(self) -> OutgoingSession | IncomingSession:
        """A duplicate of the session, which the process goes on holding.

        Raises:
            LuoError: the process is gone (ENOENT, ECONNREFUSED), or answered nonsense (EPROTO).
        """
        with _connect(self.name, self.direction) as connection, raising("ask holder", str(self)):
            connection.send(_SESSION)
            _, fds, _, _ = socket.recv_fds(connection, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise LuoError(EPROTO, "ask holder", str(self), "It gave no session")
        return _adopt(fds[0], self.direction)

    def release(self) -> None:
        """Ends the process, and with it the session, unless others have it open too.

        Raises:
            LuoError: as for `session`.
        """
        with _connect(self.name, self.direction) as connection, raising("ask holder", str(self)):
            connection.settimeout(None)  # giving much memory back takes long
            connection.send(_RELEASE)
            connection.recv(64)  # comes when the session is closed

    def __str__(self) -> str:
        return f"process {self.pid}, which holds {self.direction} session {self.name!r}"


def hold(session: OutgoingSession) -> Holder:
    """Starts a process that holds a duplicate of an outgoing session.

    Raises:
        LuoError: EEXIST, one of this name runs; ECHILD, it did not start; ETIMEDOUT, not in time.
            Nothing is held then.
    """
    with raising("dup", f"session {session.name!r}"):
        fd = os.dup(session.fileno())
    try:
        return _start(session.name, "outgoing", fd)
    finally:
        os.close(fd)


def retrieve(name: str) -> Holder:
    """Starts a process that retrieves an incoming session itself, and holds it.

    Raises:
        LuoError: EEXIST, one of this name runs; ECHILD, it did not start; and as
            `LiveUpdate.retrieve_session` does.
    """
    return _start(name, "incoming", -1)


def find(name: str, direction: str) -> Holder | None:
    """The process that holds this session, if there is one.

    Raises:
        LuoPermissionError: EACCES, the folder or the process belongs to somebody else.
    """
    try:
        with _connect(name, direction) as connection:
            return Holder(name, direction, peer_credentials(connection).pid)
    except LuoError as error:
        if error.errno not in (ENOENT, ECONNREFUSED):
            raise
    return None


def _folder() -> str:
    """Where the sockets are; only its owner may enter."""
    if os.geteuid() == 0:
        folder = "/run/pyluo"
    else:
        folder = os.path.join(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", f"pyluo-{os.geteuid()}")
    with raising("make folder", folder), suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not private or stat.S_IMODE(status.st_mode) & 0o077:
        raise LuoPermissionError(
            EACCES, "use folder", folder, "It has to be yours alone: a folder of mode 0700"
        )
    return folder


def _address(name: str, direction: str) -> str:
    """A session's name may be longer than a socket's, and have a slash in it."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=12).hexdigest()
    return os.path.join(_folder(), f"{digest}-{direction}")


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _connect(name: str, direction: str) -> socket.socket:
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
    """Runs this module in a process of its own, and waits until it holds the session."""
    address = _address(name, direction)
    with _start_lock() as lock, ExitStack() as stack:
        if (found := find(name, direction)) is not None:
            raise LuoError(EEXIST, "start holder", str(found), "Release it first")
        with suppress(FileNotFoundError):
            os.unlink(address)  # of a holder that was killed: nobody listens
        ours, childs = map(stack.enter_context, socket.socketpair(type=socket.SOCK_SEQPACKET))
        stderr = stack.enter_context(tempfile.TemporaryFile())
        numbers = childs.fileno(), lock, fd
        command = [sys.executable, "-m", "pyluo.holder", *map(str, numbers), address, name]
        path = [os.path.abspath(entry) for entry in sys.path]  # it starts elsewhere
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
        process.wait()  # it forks at once
        childs.close()
        ours.settimeout(_START_TIMEOUT)
        with raising("start holder", f"session {name!r}"):
            answer = ours.recv(1 << 16)
        if not answer:
            stderr.seek(0)
            hint = stderr.read().decode(errors="replace").strip()
            raise LuoError(ECHILD, "start holder", f"session {name!r}", hint)
        outcome = pickle.loads(answer)  # of our own child, over a channel of our own
        if isinstance(outcome, LuoError):
            raise outcome
        with raising("start holder", f"session {name!r}"):
            ours.send(_KEEP)
        return Holder(name, direction, outcome)


@contextmanager
def _start_lock() -> Iterator[int]:
    """One process at a time starts a holder: two of one name would take each other's socket.

    The lock lasts until the last descriptor of it is closed, and the holder gets one: it goes on
    though who started it is gone.
    """
    with open(os.path.join(_folder(), "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _main() -> None:
    """The process: says how it went to who started it, then serves until it is released."""
    channel, lock, fd = map(int, sys.argv[1:4])
    address, name = sys.argv[4:]
    if os.fork():
        os._exit(0)  # who started us waits for this one, and is not our parent
    with socket.socket(fileno=channel) as starter:
        try:
            listener = _listen(address)
        except LuoError as error:
            starter.send(pickle.dumps(error))
            return
        try:
            # From the next line on nothing may fail: the end of this process is the end of the
            # session.
            session = _obtain_session(fd, name)
        except LuoError as error:
            os.unlink(address)
            starter.send(pickle.dumps(error))
            return
        _daemonize()
        os.close(lock)
        confirmed = _starter_confirms(starter)
    last = _serve(listener, session) if confirmed or fd < 0 else None
    with suppress(OSError):
        os.unlink(address)
    os.close(session.detach())
    if last is not None:
        last.close()  # only now: who released it waits for this


def _starter_confirms(starter: socket.socket) -> bool:
    """Whether who started this process still wants it, once it is answer that all is well."""
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
    if fd >= 0:
        return _adopt(fd, "outgoing")
    with LiveUpdate() as device:
        return device.retrieve_session(name)


def _adopt(fd: int, direction: str) -> OutgoingSession | IncomingSession:
    """A session of a direction that is known; the kernel need not be new enough to tell."""
    kind = IncomingSession if direction == "incoming" else OutgoingSession
    try:
        return kind.from_fd(fd, trusted=True)
    except BaseException:
        os.close(fd)
        raise


def _daemonize() -> None:
    """Keeps what commonly ends a process from ending this one, and keeps it from holding more."""
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
    """Answers until it is released; the connection that did it."""
    while True:
        try:
            connection, _ = listener.accept()
        except (OSError, MemoryError):  # of the whole system, for a while
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
