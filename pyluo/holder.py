"""A process that does nothing but hold a session, so that the session outlives who made it.

It listens on a socket in a folder that only its user may enter, and answers that user and root:
`session` is answered with a duplicate of the descriptor, `release` ends it. It survives its
parent, and the terminal's hang-up; a jump ends it, after the session has gone over.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import stat
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from errno import EACCES, ECHILD, ECONNREFUSED, EEXIST, ENOENT, EPROTO
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.errors import LuoError, LuoPermissionError
from pyluo.liveupdate import LiveUpdate
from pyluo.session import IncomingSession, OutgoingSession, session_from_fd

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["Holder", "find", "hold", "retrieve"]

_SESSION, _RELEASE = b"session", b"release"
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ANSWER_TIMEOUT = 5.0  # seconds
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
        with _connect(self.name, self.direction) as connection:
            connection.send(_SESSION)
            _, fds, _, _ = socket.recv_fds(connection, 64, 1)
        if not fds:
            raise LuoError(EPROTO, "session of a holder", f"process {self.pid}")
        os.set_inheritable(fds[0], False)
        try:
            return session_from_fd(fds[0])
        except BaseException:
            os.close(fds[0])
            raise

    def release(self) -> None:
        """Ends the process, and with it the session, unless others have it open too.

        Raises:
            LuoError: as for `session`.
        """
        with _connect(self.name, self.direction) as connection:
            connection.send(_RELEASE)
            connection.recv(64)  # comes when the session is closed


def hold(session: OutgoingSession) -> Holder:
    """Starts a process that holds a duplicate of an outgoing session.

    Raises:
        LuoError: EEXIST, one of this name runs; ECHILD, it did not start.
    """
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
            return Holder(name, direction, _peer(connection)[0])
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
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not mine or stat.S_IMODE(status.st_mode) & 0o077:
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


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(raw)
    return pid, uid


def _connect(name: str, direction: str) -> socket.socket:
    address = _address(name, direction)
    connection = _socket()
    try:
        connection.settimeout(_ANSWER_TIMEOUT)
        with raising("connect", f"the holder of {direction} session {name!r}"):
            connection.connect(address)
        if _peer(connection)[1] not in (0, os.geteuid()):
            raise LuoPermissionError(EACCES, "connect", address, "Another user listens there")
    except BaseException:
        connection.close()
        raise
    return connection


def _start(name: str, direction: str, fd: int) -> Holder:
    """Runs this module in a process of its own, and waits until it holds the session."""
    if (found := find(name, direction)) is not None:
        raise LuoError(EEXIST, "start a holder", f"session {name!r}", f"Process {found.pid} has it")
    address = _address(name, direction)
    with suppress(FileNotFoundError):
        os.unlink(address)  # of a holder that was killed: nobody listens
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-m", "pyluo.holder", str(fd), address, name]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
        pass_fds=[fd] if fd >= 0 else [],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            told, complaint = process.communicate(timeout=_START_TIMEOUT)
        except BaseException:
            process.kill()
            raise
    if not told:
        hint = complaint.decode(errors="replace").strip()
        raise LuoError(ECHILD, "start a holder", f"session {name!r}", hint)
    outcome = pickle.loads(told)  # of our own child, over a pipe of our own
    if isinstance(outcome, LuoError):
        raise outcome
    return Holder(name, direction, outcome)


def _main() -> None:
    """The process: says on stdout how it went, then serves until it is released."""
    fd, address, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if os.fork():
        os._exit(0)  # who started us waits for this one, and is not our parent
    out = os.fdopen(os.dup(1), "wb")
    try:
        with _listen(address) as listener:
            # From here on nothing may fail: the end of this process is the end of the session.
            session = _take(fd, name)
            _settle()
            _tell(out, os.getpid())
            last = _serve(listener, session)
    except LuoError as error:
        _tell(out, error)
        return
    finally:
        with suppress(FileNotFoundError):
            os.unlink(address)
    os.close(session.detach())
    last.close()  # only now: who released it waits for this


def _listen(address: str) -> socket.socket:
    listener = _socket()
    with raising("listen", address):
        listener.bind(address)
        listener.listen()
    return listener


def _take(fd: int, name: str) -> OutgoingSession | IncomingSession:
    if fd >= 0:
        return session_from_fd(fd)
    with LiveUpdate() as device:
        return device.retrieve_session(name)


def _tell(out: BinaryIO, outcome: LuoError | int) -> None:
    """Answers who started us, who waits until nobody has these pipes open any more."""
    with suppress(BrokenPipeError), out:  # it may have been killed: all the more reason to go on
        pickle.dump(outcome, out)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _settle() -> None:
    """Keeps what commonly ends a process from ending this one."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with suppress(OSError):
        with open("/proc/self/comm", "w") as file:
            file.write("pyluo-holder")
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")


def _serve(listener: socket.socket, session: OutgoingSession | IncomingSession) -> socket.socket:
    """Answers until it is released; the connection that did it."""
    while True:
        connection, _ = listener.accept()
        with suppress(OSError):
            connection.settimeout(_ANSWER_TIMEOUT)
            allowed = _peer(connection)[1] in (0, os.geteuid())
            request = connection.recv(64) if allowed else b""
            if request == _RELEASE:
                return connection
            if request == _SESSION:
                socket.send_fds(connection, [_SESSION], [session.fileno()])
        connection.close()


if __name__ == "__main__":
    _main()
