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
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd
from pyluo.errors import LuoError
from pyluo.exclusive import Exclusive, exclusively
from pyluo.keepers.keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyluo.descriptor import HasFileno

__all__ = ["ServiceManager"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_DUPFD_QUERY = 1027  # F_DUPFD_QUERY in include/uapi/linux/fcntl.h
_BARRIER_TIMEOUT = 30.0  # seconds
_OPERATION = "notify the service manager"


class ServiceManager(Keeper):
    """The descriptor store that systemd has for the service of this process.

    Use `of_this_process`: the descriptors that the manager handed to the process have one owner.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment["NOTIFY_SOCKET"]
        self._limit = int(environment.get("FDSTORE", "0"))
        self._exclusive = Exclusive("the descriptor store of this service")
        self._files: dict[_FdName, OwnedFd] = {}
        if environment.get("LISTEN_PID") == str(os.getpid()):
            names = environment.get("LISTEN_FDNAMES", "").split(":")
            for number, text in enumerate(names, _FIRST_FD):
                fd_name = _FdName.parse(text)
                if fd_name is not None and fd_name not in self._files:
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

    @exclusively
    def keep(self, name: str, label: str, fd: HasFileno) -> None:
        """Put a descriptor into the store of the service; see `Keeper.keep`.

        Raises:
            LuoError: the store has no room (ENOSPC); the manager does not answer (ETIMEDOUT).
        """
        before = self._find(name, label)
        if any(_is_same_file(self._files[one].fileno(), fd.fileno()) for one in before):
            return
        fd_name = _FdName(name, label, 1 + max((one.version for one in before), default=0))
        if len(self._files) >= self._limit:
            raise LuoError(
                errno.ENOSPC,
                _OPERATION,
                f"descriptor {fd_name}",
                f"The store of this service takes {self._limit} descriptors: raise "
                f"FileDescriptorStoreMax= in its unit, by 5 for each store of pyluo's",
            )
        with raising("dup", f"descriptor {fd.fileno()}"):
            duplicate = OwnedFd(os.dup(fd.fileno()))
        # FDPOLL=0: systemd would drop a descriptor that poll(2) reports as hung up.
        self._notify(f"FDSTORE=1\nFDNAME={fd_name}\nFDPOLL=0", [duplicate.fileno()])
        self._files[fd_name] = duplicate
        for one in before:
            self._remove(one)

    @exclusively
    def kept(self, name: str) -> dict[str, OwnedFd]:
        """Return what the manager keeps for this service under a name; see `Keeper.kept`."""
        found: dict[str, OwnedFd] = {}
        with raising("dup", f"descriptors of {name!r}"):
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
        name, *rest = text.rsplit(".", 2)
        if len(rest) != 2 or not rest[1].isdecimal():
            return None
        return cls(os.fsdecode(unquote_to_bytes(name)), rest[0], int(rest[1]))

    def __str__(self) -> str:
        return f"{quote(os.fsencode(self.name), safe='')}.{self.label}.{self.version}"
