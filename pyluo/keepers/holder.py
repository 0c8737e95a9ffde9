"""`HolderProcess`: a process whose only task is to keep the descriptors of a store open.

A holder listens on a Unix socket in a folder that only its user may enter. It accepts requests from
its own user and from root, and ends when it has released its last descriptor. It survives the end
of its parent and the hang-up of the terminal. The jump ends the process; live update preserves the
outgoing sessions that it holds for the next kernel.

A request is a packet of JSON, such as ``["keep", "outgoing-1", null]`` with a descriptor. Its
answer is a packet with a pickled result or exception, and the descriptors of the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from errno import EACCES, ECHILD, ECONNREFUSED, ECONNRESET, EMFILE, ENOENT, EPROTO, ETIMEDOUT
from typing import TYPE_CHECKING, Any

from pyluo.descriptor import OwnedFd
from pyluo.errors import KeeperError, NotPermittedError, RequestError
from pyluo.keepers.keeper import Keeper
from pyluo.keepers.systemd import systemd_is_running
from pyluo.liveupdate import LiveUpdate
from pyluo.operation import Operation, raising
from pyluo.peer import peer_credentials, same_user

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.descriptor import HasFileno

__all__ = ["HolderProcess"]

# In seconds. _ANSWER_TIMEOUT exceeds _REQUEST_TIMEOUT, so that a client that sends nothing cannot
# make other clients time out.
_REQUEST_TIMEOUT = 1.0
_ANSWER_TIMEOUT = 10.0
_START_TIMEOUT = 60.0
_PACKET = 1 << 16
_GONE = (ENOENT, ECONNREFUSED, ECONNRESET)  # the last one: it ended while it was asked
_INTERPRETER = re.compile("python|pypy")  # in the name of the program


class HolderProcess(Keeper):
    """Keeps the descriptors of each store in a process of its own.

    Args:
        python: the Python interpreter that runs the process, and can import pyluo; by default
            `sys.executable`. A program with Python embedded in it has to name one.
    """

    def __init__(self, *, python: str | None = None) -> None:
        self._python = python

    def keep(self, name: str, label: str, fd: HasFileno) -> None:
        """Give a descriptor to the holder of a store, and start the holder if there is none.

        Raises:
            KeeperError: the new process did not start (ECHILD), or not in time (ETIMEDOUT); no
                Python interpreter is known that could run it (ENOENT); the holder is another user's
                (EACCES).
        """
        while True:
            try:
                _ask(name, "keep", label, fd=fd.fileno())
            except RequestError as error:
                if error.errno not in _GONE:
                    raise
            else:
                return
            _start(name, self._python)

    def retrieve(self, name: str, label: str, *, wait: float = 0.0) -> None:
        """Have the holder of a store retrieve its incoming session, and keep it.

        No moment passes in which only the calling process has the session.

        Args:
            name: the name of the session.
            label: the label under which the holder keeps the session.
            wait: see `LiveUpdate`.

        Raises:
            RequestError: see `keep`, `LiveUpdate` and `LiveUpdate.retrieve_session`.
        """
        while True:
            try:
                argument = {"name": name, "wait": wait}
                _ask(name, "retrieve", label, argument, timeout=_ANSWER_TIMEOUT + wait)
            except RequestError as error:
                # An error that is about the request itself comes from the holder.
                if error.errno not in _GONE or error.operation != _CONNECT.name:
                    raise
            else:
                return
            _start(name, self._python)

    def kept(self, name: str) -> dict[str, OwnedFd]:
        """Return what the holder of a store keeps; an empty dictionary if there is no holder."""
        try:
            labels, files = _ask(name, "list", "")
        except RequestError as error:
            if error.errno in _GONE:
                return {}
            raise
        return dict(zip(labels, files, strict=True))

    def release(self, name: str, label: str) -> None:
        """Have the holder of a store close a descriptor; after the last one the holder ends."""
        try:
            # It can take long to free much memory.
            _ask(name, "release", label, timeout=None)
        except RequestError as error:
            if error.errno not in _GONE:
                raise

    def describe(self, name: str) -> str:
        """Return words for the holder of a store; see `Keeper.describe`."""
        try:
            with _connect(name) as connection:
                return f"process {peer_credentials(connection).pid}"
        except RequestError as error:
            if error.errno not in _GONE:
                raise
        return "no process"


_CONNECT = Operation("connect to holder", KeeperError)
_ASK = Operation("ask holder", KeeperError)
_START = Operation("start holder", KeeperError)


def _ask(
    name: str,
    request: str,
    label: str,
    argument: dict[str, Any] | None = None,
    *,
    fd: int | None = None,
    timeout: float | None = _ANSWER_TIMEOUT,
) -> Any:
    """Make a request of the holder of a store; return its answer."""
    with _connect(name) as connection:
        with _ASK.raising(f"of {name!r}"):
            connection.settimeout(timeout)
            packet = json.dumps([request, label, argument]).encode()
            socket.send_fds(connection, [packet], [] if fd is None else [fd])
            answer, fds, flags, _ = socket.recv_fds(
                connection, _PACKET, 64, socket.MSG_CMSG_CLOEXEC
            )
            if request == "release":
                connection.recv(1)  # until the holder closes the connection, as the last thing
        files = [OwnedFd(number) for number in fds]
        if flags & socket.MSG_CTRUNC:
            raise KeeperError(EMFILE, "ask holder", f"of {name!r}", "Raise RLIMIT_NOFILE")
        if not answer:
            raise KeeperError(EPROTO, "ask holder", f"of {name!r}", "It sent no answer")
        # Unpickling is safe: the answer comes from this user or root.
        result = pickle.loads(answer)
        if isinstance(result, RequestError):
            raise result
        return (result, files) if request == "list" else result


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
        raise NotPermittedError(
            EACCES, "use folder", folder, "It must be your own folder, of mode 0700"
        )
    return folder


def _address(name: str) -> str:
    """Return the path of a holder's socket.

    The path contains a digest of the store's name, because a name can contain slashes and be too
    long for a socket path.
    """
    digest = hashlib.blake2b(os.fsencode(name), digest_size=12).hexdigest()
    return os.path.join(_folder(), digest)


def _connect(name: str) -> socket.socket:
    """Return a connection to the holder of a store, after checking the holder's user."""
    address = _address(name)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_ANSWER_TIMEOUT)
        with _CONNECT.raising(f"of {name!r}"):
            connection.connect(address)
            listener = peer_credentials(connection)
        if not same_user(listener):
            raise NotPermittedError(EACCES, _CONNECT.name, address, "Another user listens there")
    except BaseException:
        connection.close()
        raise
    return connection


def find_python(named: str | None) -> str:
    """Return the path of the Python interpreter that is to run a holder.

    Raises:
        KeeperError: `sys.executable` is none, as in a program with Python embedded in it (ENOENT).
            Such a program must not be run in the place of an interpreter: it might do anything.
    """
    if named is not None:
        return named
    executable = sys.executable or ""
    name = os.path.basename(os.path.realpath(executable)) if executable else ""
    if getattr(sys, "frozen", False) or not _INTERPRETER.search(name):
        hint = (
            f"sys.executable is {sys.executable!r}, which is no Python interpreter; Python seems "
            "to be embedded in this program. Name one that can import pyluo: "
            "keeper=HolderProcess(python='/usr/bin/python3')"
        )
        raise KeeperError(ENOENT, "find Python", "to start a holder process", hint)
    return executable


def _start(name: str, named_python: str | None) -> None:
    """Start the holder of a store, unless there is one; return when it listens."""
    python = find_python(named_python)
    address = _address(name)
    with _start_lock() as lock, ExitStack() as stack:
        try:
            _connect(name).close()
        except RequestError as error:
            if error.errno not in _GONE:
                raise
        else:
            return
        with suppress(FileNotFoundError):
            os.unlink(address)  # left by a holder that was killed
        reader, writer = (stack.enter_context(OwnedFd(fd)) for fd in os.pipe2(os.O_CLOEXEC))
        stderr = stack.enter_context(tempfile.TemporaryFile())
        command = [python, "-m", __name__, str(writer.fileno()), str(lock), address]
        # The process starts in "/", so relative paths must become absolute.
        path = [os.path.abspath(entry) for entry in sys.path]
        with _START.raising(f"of {name!r}, by {python}"):
            process = subprocess.Popen(
                [*_out_of_the_service(), *command],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                cwd="/",
                pass_fds=[writer.fileno(), lock],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        writer.close()
        process.wait()  # the process forks and ends; its child becomes the holder
        if not select.select([reader], [], [], _START_TIMEOUT)[0]:
            raise KeeperError(ETIMEDOUT, "start holder", f"of {name!r}", "It does not listen")
        if not os.read(reader.fileno(), 1):  # the end of the pipe: the process failed
            stderr.seek(0)
            hint = stderr.read().decode(errors="replace").strip()
            raise KeeperError(ECHILD, "start holder", f"of {name!r}", hint)


@contextmanager
def _start_lock() -> Iterator[int]:
    """Let only one process at a time start a holder; yield the descriptor of the lock file.

    Without the lock, two holders that start together could replace each other's socket. The lock
    lasts until the last duplicate of its descriptor is closed. The new holder inherits a duplicate,
    so that the lock lasts until the holder listens, even if the process that started it ends first.
    """
    with open(os.path.join(_folder(), "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _out_of_the_service() -> list[str]:
    """Return the beginning of a command that runs in a scope of its own, not in this service.

    systemd ends every process of a service together with the service.
    """
    with suppress(OSError), open("/proc/self/cgroup") as file:
        group = file.read().strip().rpartition(":")[2]
        services = [part for part in group.split("/") if part.endswith(".service")]
        of_user = [part for part in services if part.startswith("user@")]
        if len(services) == len(of_user) or not systemd_is_running():
            return []
        if shutil.which("systemd-run"):
            manager = ["--user"] if of_user else []
            return ["systemd-run", *manager, "--scope", "--quiet", "--collect", "--"]
        warnings.warn(
            f"the holder process ends together with {services[-1]}, because there is no "
            f"systemd-run to give it a scope of its own. Give the unit FileDescriptorStoreMax=",
            RuntimeWarning,
            stacklevel=2,
        )
    return []


def _main() -> None:
    """Run the holder: tell the process that started it that it listens, and then serve."""
    ready, lock = map(int, sys.argv[1:3])
    address = sys.argv[3]
    if os.fork():
        # The starter waits for this process. The child becomes the holder, for which the starter
        # need not wait.
        os._exit(0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        _daemonize()
        with suppress(OSError):  # the starter may have ended
            os.write(ready, b"1")
        os.close(ready)
        os.close(lock)
        last_connection = _serve(listener)
        with suppress(OSError):
            os.unlink(address)
    if last_connection is not None:
        last_connection.close()  # last, because the process at its other end waits for this


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


def _serve(listener: socket.socket) -> socket.socket | None:
    """Serve requests until nothing is kept any more.

    Returns:
        The connection of the last request; None if no request came at all.
    """
    files: dict[str, int] = {}
    listener.settimeout(_START_TIMEOUT)  # the process that started this one may have been killed
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return None
        except (OSError, MemoryError):  # the system lacks resources: try again later
            time.sleep(1)
            continue
        changed = False
        with suppress(Exception):  # whatever a client sends, the holder must not end
            connection.settimeout(_REQUEST_TIMEOUT)
            if same_user(peer_credentials(connection)):
                changed = _answer(connection, files)
        if changed and not files:
            return connection
        if files:
            listener.settimeout(None)
        connection.close()


def _answer(connection: socket.socket, files: dict[str, int]) -> bool:
    """Receive a request and answer it; return whether it was one that changes what is kept."""
    packet, fds, _, _ = socket.recv_fds(connection, _PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return False
    request, label, argument = json.loads(packet)
    result: object = None
    sent: list[int] = []
    if request == "keep" and fds:
        _replace(files, label, fds.pop())
    elif request == "retrieve":
        try:
            with LiveUpdate(wait=argument["wait"]) as device:
                session = device.retrieve_session(argument["name"])
            _replace(files, label, session.detach())
        except RequestError as error:
            result = error
    elif request == "release":
        _replace(files, label, -1)
    elif request == "list":
        result, sent = list(files), list(files.values())
    else:
        result = KeeperError(EPROTO, "ask holder", f"{request} {label}", "It cannot do this")
    for fd in fds:
        os.close(fd)
    with suppress(OSError):  # the client may have ended
        socket.send_fds(connection, [pickle.dumps(result)], sent)
    return bool(request != "list")


def _replace(files: dict[str, int], label: str, fd: int) -> None:
    """Keep a descriptor under a label, or none if `fd` is -1; close the one before."""
    before = files.pop(label, -1)
    if fd >= 0:
        files[label] = fd
    if before >= 0:
        os.close(before)


if __name__ == "__main__":
    _main()
