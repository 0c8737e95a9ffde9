"""An iommufd and what lives in it: objects with an id each, and what they hang on."""

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

_GONE = (
    "With accounting by process, the kernels up to 7.3 answer so when the process that mapped the "
    "memory is gone, as after exec: the memory is this process's now, but stays charged to it. "
    "Hand over by socket while the old process lives, or account by user"
)


class Accounting(enum.Enum):
    """Against whose RLIMIT_MEMLOCK mapped memory counts; nobody's with CAP_IPC_LOCK.

    Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE
    """

    USER = 0
    """The sum over all processes of a user."""
    PROCESS = 1
    """Each process by itself, as VFIO's containers do."""


class IommuContext(OwnedFd):
    """An open iommufd and the objects that were made in it: what every object refers to.

    `IommuFd` is the one that is opened, and makes the first objects.
    """

    __slots__ = ("_objects",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._objects: dict[int, IommuObject] = {}

    @property
    def objects(self) -> tuple[IommuObject, ...]:
        """What was made in it by this process, or made known to it, in the order of making."""
        return tuple(self._objects.values())

    def register(self, new: IommuObject, object_id: int) -> None:
        """Keeps an object until it is destroyed, or the iommufd is closed."""
        if object_id in self._objects:
            raise ValueError(f"the id {object_id} is of {self._objects[object_id]} already")
        self._objects[object_id] = new

    def fresh(self, object_id: int) -> int:
        """An id that the kernel has just given out: what it was of before is gone.

        As when another process that has the iommufd too destroyed that.
        """
        if object_id in self._objects:
            self._objects[object_id].forget()
        return object_id

    def unregister(self, object_id: int) -> None:
        """Lets go of an object."""
        gone = self._objects.pop(object_id, None)
        if gone is not None and gone.keeps_iommufd and self.closed and not self._bound():
            self._forget_objects()

    def close(self) -> None:
        """Closes it, which ends its objects; a second time does nothing."""
        super().close()
        if not self._bound():
            self._forget_objects()

    def detach(self) -> int:
        """Gives the descriptor up, still open, with all that was made in it.

        Raises:
            UserMappingError: EBUSY, a buffer of this process is mapped by its address, and would be
                free to go while devices write to it.
        """
        if by_address := self._mapped_by_address():
            raise UserMappingError(errno.EBUSY, "detach", by_address)
        fd = super().detach()
        for left in reversed(self.objects):
            left.give_up()
        return fd

    def _bound(self) -> bool:
        """Whether the kernel keeps it for a device, whatever becomes of the descriptor."""
        return any(one.keeps_iommufd for one in self._objects.values())

    def _forget_objects(self) -> None:
        while self._objects:
            _, last = self._objects.popitem()
            last.forget()

    @property
    def accounting(self) -> Accounting:
        """Against whose limit memory counts that is mapped without CAP_IPC_LOCK.

        Setting it is possible only before the first object is made.

        Raises:
            LuoPermissionError: EPERM, setting it needs CAP_SYS_RESOURCE.
            ObjectInUseError: EBUSY, there are objects already.

        Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE. Linux 6.2.
        """
        reply = _OPTION(self.fileno(), option_id=_RLIMIT_MODE, op=_OP_GET)
        return Accounting(reply.integer("val64"))

    @accounting.setter
    def accounting(self, mode: Accounting) -> None:
        _OPTION(self.fileno(), f"{mode}", option_id=_RLIMIT_MODE, op=_OP_SET, val64=mode.value)

    def change_process(self) -> None:
        """Makes this process the one whose memory is pinned and counted, for every map.

        For an iommufd that came from another process; DMA goes on meanwhile. Nothing changes if
        it fails.

        Raises:
            UserMappingError: EINVAL, something is mapped by its address in a process; memory that
                is to move is mapped by file.
            LuoError: ENOMEM, this process's RLIMIT_MEMLOCK, or its user's, has no room for it;
                EBUSY, a map or unmap is running: try again; EINVAL, with `Accounting.PROCESS` the
                process that mapped the memory is gone. The kernels up to 7.3 warn then, and have
                moved it all the same, except that this process is charged for ever.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_CHANGE_PROCESS. Linux 6.13.
        """
        before = _locked()
        reply = _CHANGE_PROCESS.attempt(self.fileno())
        # What is refused for a mapping by address is not charged to anybody first.
        if reply.errno == errno.EINVAL and _locked() > before:
            raise LuoError(reply.errno, _CHANGE_PROCESS.name, hint=_GONE)
        if reply.errno:
            raise from_errno(reply.errno, _CHANGE_PROCESS.name, self._mapped_by_address())

    def _mapped_by_address(self) -> str:
        """What is known to be mapped by its address, in words; empty if nothing is."""
        return ", ".join(
            f"{where} of {one}" for one in self._objects.values() for where in one.mapped_by_address
        )


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

    def __init__(self, iommufd: IommuContext, object_id: int, *uses: IommuObject) -> None:
        iommufd.register(self, object_id)
        self._iommufd = iommufd
        self._id = object_id
        self._uses = uses
        self._users: list[object] = []
        for used in uses:
            used.used_by(self)

    @property
    def iommufd(self) -> IommuContext:
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

    def id_in(self, iommufd: IommuContext) -> int:
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

    @property
    def mapped_by_address(self) -> tuple[IovaRange, ...]:
        """Where memory is mapped in it by its address in a process; nowhere but in an IOAS."""
        return ()

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


def _locked() -> int:
    """How much memory is locked for this process, in KiB."""
    with raising("open status", "/proc/self/status"), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmLck:"))
