"""`ServiceManager`: systemd as the keeper, by the descriptor store of the service.

The unit of the service needs ``FileDescriptorStoreMax=``. With ``FileDescriptorStorePreserve=yes``,
systemd 261 and newer also carries the sessions in the store over `systemctl kexec`. What else is in
the store then, such as the parcel of a store's table, systemd tries to carry over as well, fails,
and says so on the console; nothing is lost by that.

Source: sd_notify(3), sd_listen_fds(3), systemd.service(5), FileDescriptorStoreMax=
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd
from pyluo.errors import LuoError
from pyluo.keepers.keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyluo.descriptor import HasFileno

__all__ = ["ServiceManager"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_BARRIER_TIMEOUT = 30.0  # seconds
_OPERATION = "notify the service manager"


class ServiceManager(Keeper):
    """The descriptor store that systemd has for the service of this process.

    Use `of_this_process`: the descriptors that the manager handed to the process have one owner.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment["NOTIFY_SOCKET"]
        self._limit = int(environment.get("FDSTORE", "0"))
        self._lock = threading.Lock()
        self._files: dict[str, OwnedFd] = {}
        if environment.get("LISTEN_PID") == str(os.getpid()):
            names = environment.get("LISTEN_FDNAMES", "").split(":")
            for number, fd_name in enumerate(names, _FIRST_FD):
                if "." in fd_name and fd_name not in self._files:
                    os.set_inheritable(number, False)
                    self._files[fd_name] = OwnedFd(number)

    @classmethod
    def of_this_process(cls) -> ServiceManager | None:
        """Return the keeper of this process; None if no service manager stores descriptors for it.

        systemd says so in the environment since version 254.
        """
        global _of_this_process
        if _of_this_process is None and int(os.environ.get("FDSTORE", "0")):
            _of_this_process = cls(os.environ)
        return _of_this_process

    def keep(self, name: str, label: str, fd: HasFileno) -> None:
        """Put a descriptor into the store of the service; see `Keeper.keep`.

        Raises:
            LuoError: the store has no room (ENOSPC); the manager does not answer (ETIMEDOUT).
        """
        fd_name = _fd_name(name, label)
        with self._lock:
            if fd_name not in self._files and len(self._files) >= self._limit:
                raise LuoError(
                    errno.ENOSPC,
                    _OPERATION,
                    f"descriptor {fd_name!r}",
                    f"The store of this service takes {self._limit} descriptors: raise "
                    f"FileDescriptorStoreMax= in its unit",
                )
            with raising("dup", f"descriptor {fd.fileno()}"):
                duplicate = OwnedFd(os.dup(fd.fileno()))
            if fd_name in self._files:
                self._remove(fd_name)
            # FDPOLL=0: systemd would drop a descriptor that poll(2) reports as hung up.
            self._notify(f"FDSTORE=1\nFDNAME={fd_name}\nFDPOLL=0", [duplicate.fileno()])
            self._files[fd_name] = duplicate

    def kept(self, name: str) -> dict[str, OwnedFd]:
        """Return what the manager keeps for this service under a name; see `Keeper.kept`."""
        found: dict[str, OwnedFd] = {}
        with self._lock, raising("dup", f"descriptors of {name!r}"):
            for fd_name, file in self._files.items():
                encoded, label = fd_name.rsplit(".", 1)
                if unquote(encoded) == name:
                    found[label] = OwnedFd(os.dup(file.fileno()))
        return found

    def release(self, name: str, label: str) -> None:
        """Remove a descriptor from the store of the service; see `Keeper.release`."""
        with self._lock:
            if _fd_name(name, label) in self._files:
                self._remove(_fd_name(name, label))

    def _remove(self, fd_name: str) -> None:
        self._notify(f"FDSTOREREMOVE=1\nFDNAME={fd_name}", [])
        self._files.pop(fd_name).close()

    def _notify(self, state: str, fds: list[int]) -> None:
        """Send a notification, and wait until the manager has processed it."""
        # "@" stands for the abstract namespace.
        address = self._address.replace("@", "\0", 1) if self._address[:1] == "@" else self._address
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            with (
                raising(_OPERATION, state.split("\n")[0]),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            ):
                sender.connect(address)
                socket.send_fds(sender, [state.encode()], fds)
                # The manager closes this descriptor when it has processed what came before it.
                socket.send_fds(sender, [b"BARRIER=1"], [writer])
            os.close(writer)
            writer = -1
            poll = select.poll()
            poll.register(reader, 0)
            if not poll.poll(_BARRIER_TIMEOUT * 1000):
                raise LuoError(
                    errno.ETIMEDOUT,
                    _OPERATION,
                    state.split("\n")[0],
                    "The unit may need NotifyAccess=all",
                )
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)

    def describe(self, name: str) -> str:
        """Return words for the service manager; see `Keeper.describe`."""
        return "the service manager"


_of_this_process: ServiceManager | None = None


def _fd_name(name: str, label: str) -> str:
    """Return the FDNAME of a descriptor; it may not contain colons or control characters."""
    return f"{quote(name, safe='')}.{label}"
