"""The mock device of the kernel's own tests of iommufd, which the kernel `selftest` has.

It does no DMA. An ioctl makes it do what a device would do, and compares memory with what a device
would see.

Source: drivers/iommu/iommufd/iommufd_test.h
"""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os
import resource
import select
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

from pyluo._sys import Exported
from pyluo.iommufd import (
    HwptFlags,
    IommuContext,
    IommuDevice,
    IommuFd,
    IommuObject,
    IovaRange,
    RawData,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pyluo import Memfd
    from pyluo.iommufd import Ioas, NestedHwpt, PagingHwpt

    Table = Ioas | PagingHwpt | NestedHwpt
    Buffer = bytearray | memoryview | mmap.mmap

IOMMU_TEST_CMD = ord(";") << 8 | 0x80 + 32
DEVICES = "/sys/bus/iommufd_mock/devices"
NOBODY = 65534

# The IOVAs that a page table of the mock can map, both inclusive, and its page size in bytes.
FIRST = 1 << 24
LAST = (1 << 31) - 1
PAGE = 2048

# The mock's values where each driver has a type of its own.
HW_INFO = 0xFEEDBEEF
HW_INFO_REGISTER = 0xDEADBEEF
HWPT_DATA = 0xDEAD
INVALIDATION = 0xDEADBEEF
NO_INVALIDATION = 0xDADBEEF
VIOMMU = 0xDEADBEEF
EVENTS = 0xBEEFBEEF
HW_QUEUE = 0xDEADBEEF

TLB_ENTRIES = 4
TLB_VALUE = 0xBADBEEF
CACHE_ENTRIES = 4
CACHE_VALUE = 0xBADDAD
HW_QUEUES = 2
PASID_BITS = 20

_WRITE = 1  # a flag of IOMMU_TEST_OP_ACCESS_RW and IOMMU_TEST_OP_ACCESS_PAGES
_PINS = 1  # a flag of IOMMU_TEST_OP_CREATE_ACCESS

_HEADER = struct.Struct("@4I")  # size, op, id, reserved; then the arguments of the op
_SIZE = 72
_EVENT = struct.Struct("@I")


class _Op(enum.IntEnum):
    """The operations of the mock: IOMMU_TEST_OP_*."""

    ADD_RESERVED = 1
    MD_CHECK_MAP = 3
    MD_CHECK_REFS = 4
    CREATE_ACCESS = 5
    DESTROY_ACCESS_PAGES = 6
    ACCESS_PAGES = 7
    ACCESS_RW = 8
    MOCK_DOMAIN_REPLACE = 10
    ACCESS_REPLACE_IOAS = 11
    MOCK_DOMAIN_FLAGS = 12
    DIRTY = 13
    MD_CHECK_IOTLB = 14
    TRIGGER_IOPF = 15
    DEV_CHECK_CACHE = 16
    TRIGGER_VEVENT = 17
    PASID_ATTACH = 18
    PASID_REPLACE = 19
    PASID_DETACH = 20
    PASID_CHECK_HWPT = 21


class MockFlags(enum.IntFlag):
    """The properties of a mock device: MOCK_FLAGS_DEVICE_*."""

    NO_DIRTY = 1 << 0
    PASID = 1 << 2


_PLAIN = MockFlags(0)


def _command(
    iommufd: IommuContext, op: _Op, object_id: int, layout: str, *values: int
) -> tuple[int, ...]:
    """Send a command to the mock, and return its arguments as the kernel left them."""
    arguments = struct.Struct("@" + layout)
    memory = bytearray(_SIZE)
    _HEADER.pack_into(memory, 0, _SIZE, op, object_id, 0)
    arguments.pack_into(memory, _HEADER.size, *values)
    fcntl.ioctl(iommufd.fileno(), IOMMU_TEST_CMD, memory)
    return arguments.unpack_from(memory, _HEADER.size)


def _succeeds(check: Callable[[], object], error_number: int) -> bool:
    """Return whether a check of the mock succeeds; its errno is `error_number` if it does not."""
    try:
        check()
    except OSError as error:
        if error.errno != error_number:
            raise
        return False
    return True


def iommufd_links() -> Iterator[str]:
    """Yield the link in /proc of each open descriptor that belongs to iommufd."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            link = os.readlink(f"/proc/self/fd/{name}")
            if "iommu" in link:
                yield link


@contextmanager
def opened() -> Iterator[IommuFd]:
    """Open an iommufd, and check afterwards that no mock device and no descriptor is left."""
    with IommuFd() as iommufd:
        yield iommufd
    assert os.listdir(DEVICES) == []
    assert list(iommufd_links()) == []


class MockDevice(IommuObject):
    """A mock device, bound to an iommufd and attached to a page table.

    Args:
        iommufd: the iommufd in which to create it.
        table: the page table or the IOAS to which to attach it at first.
        flags: its properties.

    Attributes:
        device: its device object in the iommufd.
        hwpt_id: the ID of the page table to which it is attached.
    """

    noun = "mock device"

    def __init__(self, iommufd: IommuFd, table: Table, flags: MockFlags = _PLAIN) -> None:
        number, self.hwpt_id, device_id, _ = _command(
            iommufd, _Op.MOCK_DOMAIN_FLAGS, table.id, "4I", 0, 0, 0, flags
        )
        super().__init__(iommufd, number)
        self.device = IommuDevice(iommufd, device_id)
        self._pasids: set[int] = set()

    def attach(self, table: Table) -> None:
        """Attach the device to another page table instead."""
        [self.hwpt_id] = _command(self.iommufd, _Op.MOCK_DOMAIN_REPLACE, self.id, "I", table.id)

    def attach_pasid(self, pasid: int, table: Table) -> None:
        """Attach a PASID of the device to a page table, instead of the one that it has, if any."""
        op = _Op.PASID_REPLACE if pasid in self._pasids else _Op.PASID_ATTACH
        _command(self.iommufd, op, self.id, "2I", pasid, table.id)
        self._pasids.add(pasid)

    def detach_pasid(self, pasid: int) -> None:
        """Detach a PASID, which the kernel does not do when the device is destroyed."""
        _command(self.iommufd, _Op.PASID_DETACH, self.id, "I", pasid)
        self._pasids.remove(pasid)

    def pasid_is_attached_to(self, pasid: int, table: PagingHwpt | NestedHwpt | None) -> bool:
        """Return whether a PASID is attached to this page table; to none, if `table` is None."""
        number = table.id if table else 0
        return _succeeds(
            lambda: _command(self.iommufd, _Op.PASID_CHECK_HWPT, self.id, "2I", pasid, number),
            errno.EINVAL,
        )

    def forget(self) -> None:
        self.device.forget()
        super().forget()

    def raise_fault(self, address: int, *, pasid: int = 0, group: int = 0, access: int = 0) -> None:
        """Make the device report a page fault, as the only one of its group."""
        _command(
            self.iommufd,
            _Op.TRIGGER_IOPF,
            0,
            "4IQ",
            self.device.id,
            pasid,
            group,
            access,
            address,
        )

    def raise_event(self) -> None:
        """Make the vIOMMU report an event of the device to a queue of the type `EVENTS`."""
        _command(self.iommufd, _Op.TRIGGER_VEVENT, 0, "I", self.device.id)

    def cache_entries_unchanged(self) -> list[bool]:
        """Return, for each entry of the device's cache, whether it has its initial value."""
        return [
            _entry_has_value(self.device, _Op.DEV_CHECK_CACHE, entry, CACHE_VALUE)
            for entry in range(CACHE_ENTRIES)
        ]


class CpuAccess:
    """An access to the mappings of an IOAS by the CPU, as drivers of devices without DMA have it.

    Args:
        ioas: the IOAS to access.
        pins: whether it pins pages, instead of copying their contents.
    """

    def __init__(self, ioas: Ioas, *, pins: bool = False) -> None:
        self._iommufd = ioas.iommufd
        flags = _PINS if pins else 0
        self._fd, _ = _command(self._iommufd, _Op.CREATE_ACCESS, ioas.id, "2I", 0, flags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, iova: int, length: int) -> bytes:
        """Read from mapped memory."""
        data = bytearray(length)
        self._copy(iova, data, 0)
        return bytes(data)

    def write(self, iova: int, data: bytes) -> None:
        """Write to mapped memory."""
        self._copy(iova, bytearray(data), _WRITE)

    def pin(self, iova: int, length: int) -> int:
        """Pin mapped pages until they are unmapped; return their number for `unpin`."""
        _, number, *_ = _command(
            self._iommufd, _Op.ACCESS_PAGES, self._fd, "2I3Q", 0, 0, iova, length, 0
        )
        return number

    def unpin(self, number: int) -> None:
        """Unpin the pages that `pin` pinned under this number."""
        _command(self._iommufd, _Op.DESTROY_ACCESS_PAGES, self._fd, "I", number)

    def move(self, ioas: Ioas) -> None:
        """Access another IOAS from now on."""
        _command(self._iommufd, _Op.ACCESS_REPLACE_IOAS, self._fd, "I", ioas.id)

    def _copy(self, iova: int, data: bytearray, flags: int) -> None:
        where = Exported(data)
        _command(
            self._iommufd,
            _Op.ACCESS_RW,
            self._fd,
            "3QI",
            iova,
            where.length,
            where.address,
            flags,
        )


def reserve(ioas: Ioas, where: IovaRange) -> None:
    """Reserve IOVAs, as a device does that cannot use them."""
    length = where.last - where.start + 1
    _command(ioas.iommufd, _Op.ADD_RESERVED, ioas.id, "2Q", where.start, length)


def maps_buffer(hwpt: PagingHwpt | MockDevice, iova: int, buffer: Buffer) -> bool:
    """Return whether a page table maps the pages of a buffer at an IOVA."""
    number = hwpt.hwpt_id if isinstance(hwpt, MockDevice) else hwpt.id
    where = Exported(buffer)
    check = (hwpt.iommufd, _Op.MD_CHECK_MAP, number, "3Q", iova, where.length, where.address)
    return _succeeds(lambda: _command(*check), errno.EINVAL)


def is_pinned(iommufd: IommuFd, buffer: Buffer, times: int) -> bool:
    """Return whether each page of a buffer is pinned that many times."""
    where = Exported(buffer)
    check = (iommufd, _Op.MD_CHECK_REFS, 0, "2QI", where.length, where.address, times)
    return _succeeds(lambda: _command(*check), errno.EIO)


def write_pages(hwpt: PagingHwpt, start: int, pages: Iterable[int]) -> None:
    """Make a device write to pages; their numbers count from the IOVA `start`."""
    numbers = set(pages)
    count = max(numbers) + 1
    bits = bytearray(-(-count // 64) * 8)
    for number in numbers:
        bits[number // 8] |= 1 << number % 8
    where = Exported(bits)
    arguments = (0, start, count * mmap.PAGESIZE, mmap.PAGESIZE, where.address, 0)
    *_, written = _command(hwpt.iommufd, _Op.DIRTY, hwpt.id, "I5Q", *arguments)
    assert written == len(numbers)


def tlb_entries_unchanged(hwpt: NestedHwpt) -> list[bool]:
    """Return, for each entry of a nested HWPT's TLB, whether it has its initial value."""
    return [
        _entry_has_value(hwpt, _Op.MD_CHECK_IOTLB, entry, TLB_VALUE) for entry in range(TLB_ENTRIES)
    ]


def _entry_has_value(owner: IommuObject, op: _Op, entry: int, value: int) -> bool:
    check = (owner.iommufd, op, owner.id, "2I", entry, value)
    return _succeeds(lambda: _command(*check), errno.EINVAL)


def hwpt_data(tlb_value: int = TLB_VALUE) -> RawData:
    """Return the data with which the mock's driver allocates a nested page table."""
    return RawData(HWPT_DATA, struct.pack("=2I", tlb_value, 0))


def viommu_data(value: int) -> RawData:
    """Return the data with which the mock's driver allocates a vIOMMU, and to which it replies."""
    return RawData(VIOMMU, struct.pack("=2I2Q", value, 0, 0, 0))


def tlb_invalidation(entry: int | None, *, flags: int = 0) -> RawData:
    """Return an invalidation of one entry of a nested HWPT's TLB; of all, if `entry` is None."""
    everything = entry is None
    return RawData(INVALIDATION, struct.pack("=2I", flags | everything, entry or 0))


def cache_invalidation(virtual_id: int, entry: int | None, *, flags: int = 0) -> RawData:
    """Return an invalidation of one entry of a device's cache; of all, if `entry` is None.

    Args:
        virtual_id: the device's ID in the guest.
        entry: the number of the entry.
        flags: the flags of the invalidation, of which only that for all entries is valid.
    """
    everything = entry is None
    return RawData(INVALIDATION, struct.pack("=3I", flags | everything, virtual_id, entry or 0))


def make_event(virtual_id: int) -> bytes:
    """Return an event of the mock: the ID in the guest of the device that caused it."""
    return _EVENT.pack(virtual_id)


def readable(file: int) -> bool:
    """Return whether poll(2) says that there is something to read."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def fill(memfd: Memfd) -> bytes:
    """Fill a memfd so that no two of its words are the same, and return its contents."""
    data = b"".join(struct.pack("=I", number) for number in range(memfd.size // 4))
    memfd.write(data, 0)
    return data


def alloc_nesting_parent(ioas: Ioas, device: IommuDevice) -> PagingHwpt:
    """Allocate an HWPT that can be the parent of nested ones."""
    return device.alloc_hwpt(ioas, flags=HwptFlags.NEST_PARENT)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up the capabilities and the rights of root during the block."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def limited(limit: int, soft: int) -> Iterator[None]:
    """Set the soft value of a resource limit during the block."""
    usual = resource.getrlimit(limit)
    resource.setrlimit(limit, (soft, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, usual)


@contextmanager
def forked() -> Iterator[None]:
    """Have another process keep all current descriptors open during the block."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            os.close(write)
            os.read(read, 1)
        os._exit(0)
    os.close(read)
    try:
        yield
    finally:
        os.close(write)
        os.waitpid(pid, 0)
