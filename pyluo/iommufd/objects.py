"""The base classes of an iommufd and of the objects in it, such as an IOAS or a HWPT."""

from __future__ import annotations

import enum
import errno
import weakref
from typing import TYPE_CHECKING

from pyluo._sys import constant
from pyluo.descriptor import OwnedFd, guarded
from pyluo.errors import IommuError, NotPermittedError, UserMappingError
from pyluo.exclusive import Exclusive, exclusively
from pyluo.iommufd.requests import LOCKED_MEMORY, iommu_ioctl
from pyluo.operation import raising

if TYPE_CHECKING:
    from pyluo.iommufd.iova import IovaRange
    from pyluo.registers import MappedRegisters

__all__ = ["Accounting", "IommuContext", "IommuObject"]

DESTROY = iommu_ioctl(
    "IOMMU_DESTROY",
    "iommu_destroy",
    {
        errno.EBUSY: (
            "What was created from it, is attached to it or has it mapped must be "
            "destroyed, detached or unmapped first, also in other processes with the same"
            " iommufd"
        ),
    },
)
_OPTION = iommu_ioctl(
    "IOMMU_OPTION",
    "iommu_option",
    {
        errno.EPERM: (
            NotPermittedError,
            "This needs CAP_SYS_RESOURCE",
        ),
        errno.EBUSY: (
            "The accounting can be chosen only before the first object of the iommufd is created"
        ),
    },
)
_CHANGE_PROCESS = iommu_ioctl(
    "IOMMU_IOAS_CHANGE_PROCESS",
    "iommu_ioas_change_process",
    {
        errno.EINVAL: UserMappingError,
        errno.ENOMEM: LOCKED_MEMORY + "; nothing has changed",
    },
)

_RLIMIT_MODE = constant("IOMMU_OPTION_RLIMIT_MODE")
_OP_SET = constant("IOMMU_OPTION_OP_SET")
_OP_GET = constant("IOMMU_OPTION_OP_GET")

_MAPPER_GONE_HINT = (
    "With accounting by process, kernels up to 7.3 return this error if the process that mapped "
    "the memory has ended, as after exec: the memory now belongs to this process, but stays "
    "charged to it forever. Hand over by socket while the old process lives, or account by user"
)


class Accounting(enum.Enum):
    """How the kernel applies RLIMIT_MEMLOCK to mapped memory; CAP_IPC_LOCK overrides the limit.

    Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE
    """

    USER = 0
    """The limit applies to the sum over all processes of a user."""
    PROCESS = 1
    """The limit applies to each process separately, as in VFIO's containers."""


class IommuContext(OwnedFd):
    """An open iommufd, with the objects that were created in it.

    This is the base class of `IommuFd`, which adds opening /dev/iommu and the first allocations.
    Every object has a reference to its `IommuContext`.
    """

    __slots__ = ("_exclusive", "_mappings", "_objects")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._objects: dict[int, IommuObject] = {}
        self._mappings: weakref.WeakSet[MappedRegisters] = weakref.WeakSet()
        self._exclusive = Exclusive("the iommufd")
        guarded.add(self)

    @property
    def objects(self) -> tuple[IommuObject, ...]:
        """The objects that this process created or adopted, oldest first.

        They need not exist any more: another process may have destroyed them.
        """
        return tuple(self._objects.values())

    def register(self, new: IommuObject, object_id: int) -> None:
        """Add an object to `objects` until it is destroyed or the iommufd is closed.

        Raises:
            ValueError: `objects` has an object of this id already.
        """
        if object_id in self._objects:
            raise ValueError(f"the id {object_id} belongs to {self._objects[object_id]} already")
        self._objects[object_id] = new

    def claim_id(self, object_id: int) -> int:
        """Forget any known object with an id that the kernel has just given out; return the id.

        The kernel gives an id out again if another process with the same iommufd has destroyed the
        object that had it.
        """
        if object_id in self._objects:
            self._objects[object_id].forget()
        return object_id

    def add_mapping(self, mapping: MappedRegisters) -> None:
        """Note a mapping of registers, which would keep the iommufd open, to close it with it."""
        self._mappings.add(mapping)

    def unregister(self, object_id: int) -> None:
        """Remove an object from `objects`."""
        self._objects.pop(object_id, None)

    @exclusively
    def close(self) -> None:
        """Unmap the memory of this process, and close the iommufd; closing it twice does nothing.

        Unless something else keeps the iommufd open, the kernel then destroys the objects in it. A
        bound VFIO device does, and so does a descriptor that was duplicated, inherited by a child
        or sent to another process. Then mappings of files stay, and DMA to them goes on. But what
        this process mapped by its address is unmapped in any case, because the process may free
        that memory from now on.
        """
        super().close()

    def _close(self) -> None:
        for mapping in list(self._mappings):
            mapping.close()
        for one in self.objects:
            one.unmap_own_memory()
        super()._close()
        while self._objects:
            _, last = self._objects.popitem()
            last.forget()

    @exclusively
    def detach(self) -> int:
        """Return the descriptor without closing it, and forget all objects in the iommufd.

        The caller owns the descriptor from now on. In the kernel the objects are unchanged.

        Raises:
            UserMappingError: see `refuse_to_share`.
        """
        self._refuse_to_share("detach")
        fd = super().detach()
        for left in reversed(self.objects):
            left.give_up()
        return fd

    @exclusively
    def refuse_to_share(self, operation: str) -> None:
        """Refuse to give the descriptor away while memory of this process is mapped by its address.

        Devices could write to that memory after this process has freed it.

        Raises:
            UserMappingError: a buffer of this process is mapped by its address (EBUSY).
        """
        self._refuse_to_share(operation)

    def _refuse_to_share(self, operation: str) -> None:
        if by_address := self._mapped_by_address():
            raise UserMappingError(errno.EBUSY, operation, by_address)

    @property
    def accounting(self) -> Accounting:
        """How RLIMIT_MEMLOCK applies to memory that is mapped without CAP_IPC_LOCK.

        This can be set only before the first object of the iommufd is created.

        Raises:
            NotPermittedError: setting it needs CAP_SYS_RESOURCE (EPERM).
            IommuError: the iommufd has objects already (EBUSY).

        Source: include/uapi/linux/iommufd.h, IOMMU_OPTION, IOMMU_OPTION_RLIMIT_MODE. Linux
        6.2.
        """
        reply = _OPTION(self.fileno(), option_id=_RLIMIT_MODE, op=_OP_GET)
        return Accounting(reply.integer("val64"))

    @accounting.setter
    def accounting(self, mode: Accounting) -> None:
        _OPTION(self.fileno(), f"{mode}", option_id=_RLIMIT_MODE, op=_OP_SET, val64=mode.value)

    @exclusively
    def change_process(self) -> None:
        """Charge the memory of all mappings to this process instead of the process that mapped it.

        Call this for an iommufd that another process has handed over. DMA continues during the
        call. If the call fails, nothing has changed, with the one exception below.

        Raises:
            UserMappingError: memory is mapped by its address in a process (EINVAL); only memory
                that is mapped by file can move.
            IommuError: RLIMIT_MEMLOCK of this process, or of its user, is too low (ENOMEM); a map
                or unmap is running: try again (EBUSY); with `Accounting.PROCESS`, the process that
                mapped the memory has ended (EINVAL). In this last case, kernels up to 7.3 log a
                warning, and have moved the memory nevertheless, but charge this process for it
                forever.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_CHANGE_PROCESS. Linux 6.13.
        """
        before = _read_locked_kib()
        reply = _CHANGE_PROCESS.attempt(self.fileno())
        # EINVAL has two causes. If it is a mapping by address, the kernel has charged no memory to
        # this process.
        if reply.errno == errno.EINVAL and _read_locked_kib() > before:
            raise IommuError(reply.errno, _CHANGE_PROCESS.name, hint=_MAPPER_GONE_HINT)
        if reply.errno:
            raise _CHANGE_PROCESS.error(reply.errno, self._mapped_by_address())

    def _mapped_by_address(self) -> str:
        """Return words for the ranges that are known to be mapped by address; empty if none are."""
        return ", ".join(f"{where} of {one}" for one in self.objects for where in one.own_memory)


class IommuObject:
    """An object of an iommufd, which the kernel identifies by its id.

    The kernel's object exists until it is destroyed or the iommufd ends, even if Python has no
    reference to it. The constructor does not allocate an object in the kernel: the id must exist
    already, for example because another process allocated it.

    A lock lets one thread at a time change an iommufd or an object in it.

    Args:
        iommufd: the iommufd that the object is in.
        object_id: the object's id in the iommufd.

    Raises:
        ValueError: this process knows an object with this id already.
    """

    noun = "object"

    def __init__(self, iommufd: IommuContext, object_id: int) -> None:
        iommufd.register(self, object_id)
        self._iommufd = iommufd
        self._id = object_id

    @property
    def _exclusive(self) -> Exclusive:
        return self._iommufd._exclusive

    @property
    def iommufd(self) -> IommuContext:
        """The iommufd that the object is in."""
        return self._iommufd

    @property
    def id(self) -> int:
        """The object's id in the iommufd. It is not valid in the next kernel.

        Raises:
            ValueError: the object is destroyed.
        """
        if self.destroyed:
            raise ValueError(f"the {self.noun} is destroyed")
        return self._id

    def id_in(self, iommufd: IommuContext) -> int:
        """Return the object's id, after checking that the object is in `iommufd`.

        Raises:
            ValueError: the object is in another iommufd, or destroyed.
        """
        if self._iommufd is not iommufd:
            raise ValueError(f"{self} lives in another iommufd")
        return self.id

    @property
    def destroyed(self) -> bool:
        """Whether the object was destroyed by this process, or its iommufd was closed."""
        return self._id < 0 or self._iommufd.closed

    @property
    def own_memory(self) -> tuple[IovaRange, ...]:
        """The ranges at which this process mapped its memory by address; only an IOAS has any."""
        return ()

    def unmap_own_memory(self) -> None:
        """Unmap what is in `own_memory`, so that the process may free the memory."""

    @exclusively
    def destroy(self) -> None:
        """Destroy the object; destroying it twice does nothing.

        Raises:
            IommuError: other objects or devices still use this one (EBUSY). Nothing has
                changed.

        Source: include/uapi/linux/iommufd.h, IOMMU_DESTROY. Linux 6.2.
        """
        self._destroy()

    def _destroy(self) -> None:
        if self.destroyed:
            return
        reply = DESTROY.attempt(self._iommufd.fileno(), id=self._id)
        if reply.errno not in (0, errno.ENOENT):  # another process may have destroyed it
            raise DESTROY.error(reply.errno, str(self))
        self.forget()

    def forget(self) -> None:
        """Note that the kernel has destroyed the object; no request is made to the kernel."""
        if self._id >= 0:
            self._iommufd.unregister(self._id)
            self._id = -1

    def give_up(self) -> None:
        """Note that this process gave up the iommufd, in which the object still exists."""
        self.forget()

    def __str__(self) -> str:
        return f"{self.noun} {self._id}" if self._id >= 0 else f"destroyed {self.noun}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


def _read_locked_kib() -> int:
    """Return the amount of memory that is locked for this process, in KiB."""
    with raising("open status", "/proc/self/status"), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmLck:"))
