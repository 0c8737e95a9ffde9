"""What lives in an iommufd: an id each, and what it hangs on."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl
from pyluo.errors import ObjectInUseError, from_errno

if TYPE_CHECKING:
    from pyluo.iommufd.context import IommuFd

__all__ = ["IommuObject"]

_DESTROY = Ioctl("IOMMU_DESTROY", "iommu_destroy")


class IommuObject:
    """An object of an iommufd, known to the kernel by its id.

    It lives until it is destroyed or the iommufd ends, whether or not Python still refers to it.
    The constructor allocates nothing: it makes an object of this class for an id that exists, as
    when the iommufd came from another process.

    Not locked: use the objects of one iommufd from one thread at a time.

    Args:
        iommufd: what it lives in.
        object_id: its number there.
        uses: the objects that cannot be destroyed before it.

    Raises:
        ValueError: there is an object of this id already.
    """

    noun = "object"
    keeps_iommufd = False
    """Whether the kernel keeps the iommufd for it, after the last descriptor is closed."""

    def __init__(self, iommufd: IommuFd, object_id: int, *uses: IommuObject) -> None:
        iommufd.register(self, object_id)
        self._iommufd = iommufd
        self._id = object_id
        self._uses = uses
        self._users: list[object] = []
        for used in uses:
            used.used_by(self)

    @property
    def iommufd(self) -> IommuFd:
        """What it lives in."""
        return self._iommufd

    @property
    def id(self) -> int:
        """Its number within the iommufd. Not to be stored: the next kernel gives out others.

        Raises:
            ValueError: it is destroyed.
        """
        if self.destroyed:
            raise ValueError(f"the {self.noun} is destroyed")
        return self._id

    def id_in(self, iommufd: IommuFd) -> int:
        """Its number, for a request to an iommufd: in another one the number is of something else.

        Raises:
            ValueError: it lives in another iommufd, or is destroyed.
        """
        if self._iommufd is not iommufd:
            raise ValueError(f"{self} lives in another iommufd")
        return self.id

    @property
    def destroyed(self) -> bool:
        """Whether it is gone, alone or with its iommufd, and its id perhaps another's."""
        return self._id < 0 or self._iommufd.closed

    @property
    def users(self) -> tuple[object, ...]:
        """What hangs on it, as far as this process made it, and goes before it."""
        return tuple(self._users)

    def used_by(self, user: object) -> None:
        """Notes that `user` needs this object: it is attached to it, or made from it."""
        self._users.append(user)

    def freed_by(self, user: object) -> None:
        """Notes that `user` needs it no longer, or once less."""
        if user in self._users:
            self._users.remove(user)

    def destroy(self) -> None:
        """Destroys it; a second time does nothing.

        Raises:
            ObjectInUseError: EBUSY, something still hangs on it, which the error names; nothing
                has changed.

        Source: include/uapi/linux/iommufd.h, IOMMU_DESTROY. Linux 6.2.
        """
        if self.destroyed:
            return
        reply = _DESTROY.attempt(self._iommufd.fileno(), id=self._id)
        if reply.errno == errno.EBUSY:
            raise self._in_use()
        if reply.errno not in (0, errno.ENOENT):  # another process may have destroyed it
            raise from_errno(reply.errno, _DESTROY.name, str(self))
        self.forget()

    def forget(self) -> None:
        """Notes that the kernel has destroyed it, or that another process took it over.

        Nothing is asked of the kernel.
        """
        if self._id < 0:
            return
        for used in self._uses:
            used.freed_by(self)
        self._iommufd.unregister(self._id)
        self._id = -1

    def give_up(self) -> None:
        """Notes that the iommufd is no longer this process's to use, and lives on."""
        self.forget()

    def _in_use(self) -> ObjectInUseError:
        by = ", ".join(map(str, self._users))
        hint = f"Still used by {by}: that goes first" if by else ""
        return ObjectInUseError(errno.EBUSY, _DESTROY.name, str(self), hint)

    def __str__(self) -> str:
        return f"{self.noun} {self._id}" if self._id >= 0 else f"destroyed {self.noun}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"
