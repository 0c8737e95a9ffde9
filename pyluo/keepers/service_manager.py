"""`ServiceManager`: systemd as the keeper, by the descriptor store of the service.

The unit of the service needs ``FileDescriptorStoreMax=``. With ``FileDescriptorStorePreserve=yes``,
systemd 261 and newer also carries the sessions in the store over `systemctl kexec`. What else is in
the store then, such as the parcel of a store's table, systemd tries to carry over as well, fails,
and says so on the console; nothing is lost by that.

Source: sd_notify(3), sd_listen_fds(3), systemd.service(5), FileDescriptorStoreMax=
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from pyluo.descriptor import OwnedFd
from pyluo.errors import KeeperError, RequestError
from pyluo.exclusive import Exclusive, exclusively
from pyluo.keepers.keeper import Keeper
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping

    from pyluo.descriptor import HasFileno

__all__ = ["ServiceManager"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_DUPFD_QUERY = 1027  # F_DUPFD_QUERY in include/uapi/linux/fcntl.h
_BARRIER_TIMEOUT = 30.0  # seconds
_PREFIX = "pyluo"
_CANARY = f"{_PREFIX}.canary"
_TAKEN = "PYLUO_LISTEN_FDS_TAKEN"
_NOTIFY = Operation("notify the service manager", KeeperError)
_DUP = Operation("dup", KeeperError)


class ServiceManager(Keeper):
    """The descriptor store that systemd has for the service of this process.

    Use `of_this_process`: the descriptors that the manager handed to the process have one owner.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._exclusive = Exclusive("the descriptor store of this service")
        self._address = environment["NOTIFY_SOCKET"]
        self._pid = os.getpid()
        self._files: dict[_FdName, OwnedFd] = {}
        self._unsure: set[_FdName] = set()  # those that an interrupted `keep` may not have stored
        self._version = 0

    @classmethod
    def of_this_process(cls) -> ServiceManager | None:
        """Return the keeper of this process; None if no service manager stores descriptors for it.

        systemd says so in the environment since version 254. It means the process that it started:
        the children of that process inherit the environment, but not what is stored.
        """
        global _of_this_process
        with _lock:
            started = os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())
            if not started or not int(os.environ.get("FDSTORE", "0")):
                return None
            if _of_this_process is None or _of_this_process._pid != os.getpid():
                _of_this_process = cls(os.environ)
                _of_this_process._take_over(os.environ)
        return _of_this_process

    def _take_over(self, environment: MutableMapping[str, str]) -> None:
        """Take the descriptors that the manager has handed to this process.

        They are taken once: a program that this process executes has the same PID, and other files
        under these numbers.
        """
        if environment.get("LISTEN_PID") != str(self._pid):
            return
        if environment.get(_TAKEN) == str(self._pid):
            return
        environment[_TAKEN] = str(self._pid)
        names = environment.get("LISTEN_FDNAMES", "").split(":")
        for number, text in enumerate(names, _FIRST_FD):
            if (fd_name := _FdName.parse(text)) is not None:
                os.set_inheritable(number, False)
                file = OwnedFd(number)
                # `keep` was interrupted, and called again, if there are two of a name.
                if fd_name in self._files:
                    file.close()
                else:
                    self._files[fd_name] = file
                self._version = max(self._version, fd_name.version)

    def retrieve(self, name: str, label: str, *, wait: float = 0.0) -> None:
        """Retrieve the incoming session of a store, and keep it; see `Keeper.retrieve`.

        Whether the store of the service has room is known before the session is retrieved.
        """
        self._refuse_if_full(name)
        super().retrieve(name, label, wait=wait)

    @exclusively
    def _refuse_if_full(self, name: str) -> None:
        if not self._takes_another():
            raise self._full_error(name)

    @exclusively
    def keep(self, name: str, label: str, fd: HasFileno) -> None:
        """Put a descriptor into the store of the service; see `Keeper.keep`.

        Raises:
            KeeperError: the store has no room, or does not accept descriptors from this process
                (ENOSPC); the manager does not answer (ETIMEDOUT).
        """
        before = self._find(name, label)
        same = [one for one in before if _is_same_file(self._files[one].fileno(), fd.fileno())]
        if set(same) - self._unsure:
            return
        if same:
            # Under the same name: systemd ignores a file that it has, and removing the first name
            # would remove it.
            fd_name = same[0]
        else:
            self._version += 1
            fd_name = _FdName(name, label, self._version)
            with _DUP.raising(f"descriptor {fd.fileno()}"):
                duplicate = OwnedFd(os.dup(fd.fileno()))
            # Before it is stored, so that `release` removes it even if this call is interrupted.
            self._unsure.add(fd_name)
            self._files[fd_name] = duplicate
        # FDPOLL=0: systemd would drop a descriptor that poll(2) reports as hung up.
        fds = [self._files[fd_name].fileno()]
        forget = None if same else partial(self._forget, fd_name)
        self._notify(f"FDSTORE=1\nFDNAME={fd_name}\nFDPOLL=0", fds, unsent=forget)
        # systemd closes a descriptor for which it has no room, and does not say so.
        if not self._takes_another():
            self._remove(fd_name)
            raise self._full_error(str(fd_name))
        self._unsure.discard(fd_name)
        for one in before:
            if one != fd_name:
                self._remove(one)

    def _takes_another(self) -> bool:
        """Return whether the store of the service takes another descriptor at this moment."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._notify(f"FDSTORE=1\nFDNAME={_CANARY}\nFDPOLL=0", [theirs.fileno()])
            poll = select.poll()
            poll.register(ours, 0)
            taken = not poll.poll(0)
            if taken:
                self._notify(f"FDSTOREREMOVE=1\nFDNAME={_CANARY}", [])
        return taken

    def _full_error(self, what: str) -> RequestError:
        return KeeperError(
            errno.ENOSPC,
            _NOTIFY.name,
            f"descriptor {what}",
            "The store of this service is full, or takes nothing from this process: raise "
            "FileDescriptorStoreMax= in its unit, by 6 for each store of pyluo's, or give it "
            "NotifyAccess=all",
        )

    @exclusively
    def kept(self, name: str) -> dict[str, OwnedFd]:
        """Return what the manager keeps for this service under a name; see `Keeper.kept`."""
        found: dict[str, OwnedFd] = {}
        with _DUP.raising(f"descriptors of {name!r}"):
            for fd_name in sorted(self._files):
                if fd_name.name == name:
                    # A later version replaces an earlier one, which `keep` did not come to remove.
                    if before := found.pop(fd_name.label, None):
                        before.close()
                    found[fd_name.label] = OwnedFd(os.dup(self._files[fd_name].fileno()))
        return found

    @exclusively
    def release(self, name: str, label: str) -> None:
        """Remove a descriptor from the store of the service; see `Keeper.release`."""
        for one in self._find(name, label):
            self._remove(one)

    def _find(self, name: str, label: str) -> list[_FdName]:
        return [one for one in self._files if (one.name, one.label) == (name, label)]

    def _remove(self, fd_name: _FdName) -> None:
        self._notify(f"FDSTOREREMOVE=1\nFDNAME={fd_name}", [])
        self._forget(fd_name)

    def _forget(self, fd_name: _FdName) -> None:
        """Close this process's duplicate of what the manager does not have."""
        self._files.pop(fd_name).close()
        self._unsure.discard(fd_name)

    def _notify(
        self, state: str, fds: list[int], *, unsent: Callable[[], None] | None = None
    ) -> None:
        """Send a notification, and wait until the manager has processed it.

        Args:
            state: the text of the notification.
            fds: the descriptors in it.
            unsent: is called if the manager certainly did not get it.
        """
        # "@" stands for the abstract namespace.
        address = self._address.replace("@", "\0", 1) if self._address[:1] == "@" else self._address
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            with (
                _NOTIFY.raising(state.split("\n")[0]),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            ):
                try:
                    sender.connect(address)
                    socket.send_fds(sender, [state.encode()], fds)
                except OSError:
                    if unsent is not None:
                        unsent()
                    raise
                # The manager closes this descriptor when it has processed what came before it.
                socket.send_fds(sender, [b"BARRIER=1"], [writer])
            os.close(writer)
            writer = -1
            poll = select.poll()
            poll.register(reader, 0)
            if not poll.poll(_BARRIER_TIMEOUT * 1000):
                raise KeeperError(
                    errno.ETIMEDOUT, _NOTIFY.name, state.split("\n")[0], "systemd did not answer"
                )
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)

    def describe(self, name: str) -> str:
        """Return words for the service manager; see `Keeper.describe`."""
        return "the service manager"


_of_this_process: ServiceManager | None = None
_lock = threading.Lock()


def _is_same_file(fd: int, other: int) -> bool:
    """Return whether two descriptors refer to the same open file description.

    systemd ignores a descriptor of a file that it has already, under any name.
    """
    try:
        return fcntl.fcntl(fd, _DUPFD_QUERY, other) == 1
    except OSError:  # before Linux 6.10
        return False


class _FdName(NamedTuple):
    """The FDNAME of a descriptor, which may not contain colons or control characters."""

    name: str
    label: str
    version: int

    @classmethod
    def parse(cls, text: str) -> _FdName | None:
        """Return the name that a text stands for; None if it is not one of pyluo's."""
        prefix, _, rest = text.partition(".")
        parts = rest.rsplit(".", 2)
        if prefix != _PREFIX or len(parts) != 3 or not parts[2].isdecimal():
            return None
        return cls(os.fsdecode(unquote_to_bytes(parts[0])), parts[1], int(parts[2]))

    def __str__(self) -> str:
        name = quote(os.fsencode(self.name), safe="")
        return f"{_PREFIX}.{name}.{self.label}.{self.version}"
