"""An iommufd and its objects: each has an id, and may need others."""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, constant, raising
from pyluo.descriptor import OwnedFd
from pyluo.errors import LuoError, ObjectInUseError, UserMappingError, from_errno

if TYPE_CHECKING:
    from pyluo.iommufd.iova import IovaRange

__all__ = ["Accounting", "IommuContext", "IommuObject"]

_DESTROY = Ioctl("IOMMU_DESTROY", "iommu_destroy")
_OPTION = Ioctl("IOMMU_OPTION", "iommu_option")
_CHANGE_PROCESS = Ioctl("IOMMU_IOAS_CHANGE_PROCESS", "iommu_ioas_change_process")

_RLIMIT_MODE = constant("IOMMU_OPTION_RLIMIT_MODE")
_OP_SET = constant("IOMMU_OPTION_OP_SET")
_OP_GET = constant("IOMMU_OPTION_OP_GET")

_MAPPER_GONE_HINT = (
    "With accounting by process, kernels up to 7.3 answer this if the process that mapped the "
    "memory is gone, as after exec: the memory has moved to this process, but stays charged to it "
    "for good. Hand over by socket while the old process lives, or account by user"
)


class Accounting(enum.Enum):
    """Whose RLIMIT_MEMLOCK mapped memory counts against; a process with CAP_IPC_LOCK has no limit.

    Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE
    """

    USER = 0
    """The user's: the sum over all of the user's processes."""
    PROCESS = 1
    """Each process's own, as in VFIO's containers."""


class IommuContext(OwnedFd):
    """An open iommufd and the objects that were made in it.

    This is the base of `IommuFd`, which opens /dev/iommu and makes the first objects; every object
    refers to it.
    """

    __slots__ = ("_objects",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._objects: dict[int, IommuObject] = {}

    @property
    def objects(self) -> tuple[IommuObject, ...]:
        """The objects that this process made or adopted, oldest first."""
        return tuple(self._objects.values())

    def register(self, new: IommuObject, object_id: int) -> None:
        """Add an object, which is kept until it is destroyed or the iommufd is closed.

        Raises:
            ValueError: an object of this id exists already.
        """
        if object_id in self._objects:
            raise ValueError(f"the id {object_id} belongs to {self._objects[object_id]} already")
        self._objects[object_id] = new

    def claim_id(self, object_id: int) -> int:
        """Return an id that the kernel has just given out, after forgetting its previous owner.

        An id is given out again if another process that has this iommufd destroyed its owner.
        """
        if object_id in self._objects:
            self._objects[object_id].forget()
        return object_id

    def unregister(self, object_id: int) -> None:
        """Remove an object."""
        gone = self._objects.pop(object_id, None)
        if (
            gone is not None
            and gone.keeps_iommufd
            and self.closed
            and not self._is_kept_by_device()
        ):
            self._forget_objects()

    def close(self) -> None:
        """Close the iommufd, which destroys its objects; closing it twice does nothing."""
        super().close()
        if not self._is_kept_by_device():
            self._forget_objects()

    def detach(self) -> int:
        """Give up the descriptor, still open, with everything that was made in it.

        Raises:
            UserMappingError: a buffer of this process is mapped by its address, and could be freed
                while devices write to it (EBUSY).
        """
        if by_address := self._mapped_by_address():
            raise UserMappingError(errno.EBUSY, "detach", by_address)
        fd = super().detach()
        for left in reversed(self.objects):
            left.give_up()
        return fd

    def _is_kept_by_device(self) -> bool:
        """Return whether the kernel keeps the iommufd for a device, even without a descriptor."""
        return any(one.keeps_iommufd for one in self._objects.values())

    def _forget_objects(self) -> None:
        while self._objects:
            _, last = self._objects.popitem()
            last.forget()

    @property
    def accounting(self) -> Accounting:
        """Whose limit memory counts against that is mapped without CAP_IPC_LOCK.

        It can be set only before the first object is made.

        Raises:
            LuoPermissionError: setting it needs CAP_SYS_RESOURCE (EPERM).
            ObjectInUseError: the iommufd has objects already (EBUSY).

        Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE. Linux 6.2.
        """
        reply = _OPTION(self.fileno(), option_id=_RLIMIT_MODE, op=_OP_GET)
        return Accounting(reply.integer("val64"))

    @accounting.setter
    def accounting(self, mode: Accounting) -> None:
        _OPTION(self.fileno(), f"{mode}", option_id=_RLIMIT_MODE, op=_OP_SET, val64=mode.value)

    def change_process(self) -> None:
        """Pin and account the memory of all mappings to this process.

        This is for an iommufd that came from another process. DMA continues meanwhile. If the call
        fails, nothing has changed, except as noted below.

        Raises:
            UserMappingError: something is mapped by its address in a process (EINVAL); memory that
                is to move must be mapped by file.
            LuoError: RLIMIT_MEMLOCK of this process, or of its user, is too low (ENOMEM); a map or
                unmap is running: try again (EBUSY); with `Accounting.PROCESS`, the process that
                mapped the memory is gone (EINVAL). In this last case kernels up to 7.3 warn, and
                have moved the memory all the same, but charge this process for it forever.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_CHANGE_PROCESS. Linux 6.13.
        """
        before = _read_locked_kib()
        reply = _CHANGE_PROCESS.attempt(self.fileno())
        # If the kernel refuses because of a mapping by address, it has not charged anybody.
        if reply.errno == errno.EINVAL and _read_locked_kib() > before:
            raise LuoError(reply.errno, _CHANGE_PROCESS.name, hint=_MAPPER_GONE_HINT)
        if reply.errno:
            raise from_errno(reply.errno, _CHANGE_PROCESS.name, self._mapped_by_address())

    def _mapped_by_address(self) -> str:
        """Return the ranges known to be mapped by address, as text; empty if there are none."""
        return ", ".join(
            f"{where} of {one}" for one in self._objects.values() for where in one.mapped_by_address
        )


class IommuObject:
    """An object of an iommufd, known to the kernel by its id.

    The kernel's object lives until it is destroyed or the iommufd ends, whether or not Python still
    refers to it. The constructor allocates nothing: it represents an id that exists already, for
    example in an iommufd that came from another process.

    Not locked: use the objects of one iommufd from one thread at a time.

    Args:
        iommufd: the iommufd that the object is in.
        object_id: the object's id there.
        uses: the objects that this one needs, and that cannot be destroyed before it.

    Raises:
        ValueError: an object of this id exists already.
    """

    noun = "object"
    keeps_iommufd = False
    """Whether the kernel keeps the iommufd for this object after the last descriptor is closed."""

    def __init__(self, iommufd: IommuContext, object_id: int, *uses: IommuObject) -> None:
        iommufd.register(self, object_id)
        self._iommufd = iommufd
        self._id = object_id
        self._uses = uses
        self._users: list[object] = []
        for used in uses:
            used.add_user(self)

    @property
    def iommufd(self) -> IommuContext:
        """The iommufd that the object is in."""
        return self._iommufd

    @property
    def id(self) -> int:
        """The object's id in the iommufd. Do not store it: the next kernel gives out other ids.

        Raises:
            ValueError: the object is destroyed.
        """
        if self.destroyed:
            raise ValueError(f"the {self.noun} is destroyed")
        return self._id

    def id_in(self, iommufd: IommuContext) -> int:
        """Return the object's id for a request to `iommufd`, which must be the one that it is in.

        Raises:
            ValueError: the object is in another iommufd, or destroyed.
        """
        if self._iommufd is not iommufd:
            raise ValueError(f"{self} lives in another iommufd")
        return self.id

    @property
    def destroyed(self) -> bool:
        """Whether the object is gone, alone or with its iommufd; its id may be reused then."""
        return self._id < 0 or self._iommufd.closed

    @property
    def users(self) -> tuple[object, ...]:
        """The objects that this process made from this one or attached to it; they go first."""
        return tuple(self._users)

    @property
    def mapped_by_address(self) -> tuple[IovaRange, ...]:
        """The ranges mapped by their address in a process; always empty except for an IOAS."""
        return ()

    def add_user(self, user: object) -> None:
        """Note that `user` needs this object: it is attached to it, or made from it."""
        self._users.append(user)

    def remove_user(self, user: object) -> None:
        """Note that `user` needs this object no longer, or in one place less."""
        if user in self._users:
            self._users.remove(user)

    def destroy(self) -> None:
        """Destroy the object; destroying it twice does nothing.

        Raises:
            ObjectInUseError: other objects, which the error names, still use this one (EBUSY);
                nothing has changed.

        Source: include/uapi/linux/iommufd.h, IOMMU_DESTROY. Linux 6.2.
        """
        if self.destroyed:
            return
        reply = _DESTROY.attempt(self._iommufd.fileno(), id=self._id)
        if reply.errno == errno.EBUSY:
            raise self._in_use_error()
        if reply.errno not in (0, errno.ENOENT):  # another process may have destroyed it
            raise from_errno(reply.errno, _DESTROY.name, str(self))
        self.forget()

    def forget(self) -> None:
        """Note that the kernel has destroyed the object, or that another process took it over.

        No request is made to the kernel.
        """
        if self._id < 0:
            return
        for used in self._uses:
            used.remove_user(self)
        self._iommufd.unregister(self._id)
        self._id = -1

    def give_up(self) -> None:
        """Note that the iommufd lives on, but this process no longer uses it."""
        self.forget()

    def _in_use_error(self) -> ObjectInUseError:
        by = ", ".join(map(str, self._users))
        hint = f"Still used by {by}: destroy or detach that first" if by else ""
        return ObjectInUseError(errno.EBUSY, _DESTROY.name, str(self), hint)

    def __str__(self) -> str:
        return f"{self.noun} {self._id}" if self._id >= 0 else f"destroyed {self.noun}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


def _read_locked_kib() -> int:
    """Return how much memory is locked for this process, in KiB."""
    with raising("open status", "/proc/self/status"), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmLck:"))
