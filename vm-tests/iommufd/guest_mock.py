"""The device that the kernel's own tests of iommufd invent, in a guest of the kernel `selftest`.

It has no memory bus to write to by itself: what it would do is asked for, and what it would see is
compared.

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

# Where a page table of the mock can map something, and in which units.
FIRST = 1 << 24
LAST = (1 << 31) - 1
PAGE = 2048

# The mock's kinds of what a driver has kinds of.
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

# Of IOMMU_TEST_OP_ACCESS_RW and IOMMU_TEST_OP_ACCESS_PAGES.
_WRITE = 1
_PINS = 1

_HEADER = struct.Struct("@4I")  # size, op, id, reserved; then the arguments of the op
_SIZE = 72
_EVENT = struct.Struct("@I")


class _Op(enum.IntEnum):
    """What the mock can be told to do: IOMMU_TEST_OP_*."""

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
    """What a mock device is like: MOCK_FLAGS_DEVICE_*."""

    NO_DIRTY = 1 << 0
    PASID = 1 << 2


_PLAIN = MockFlags(0)


def _command(
    iommufd: IommuContext, op: _Op, object_id: int, layout: str, *values: int
) -> tuple[int, ...]:
    """Has the mock carry out a command, and returns its arguments as the kernel left them."""
    arguments = struct.Struct("@" + layout)
    memory = bytearray(_SIZE)
    _HEADER.pack_into(memory, 0, _SIZE, op, object_id, 0)
    arguments.pack_into(memory, _HEADER.size, *values)
    fcntl.ioctl(iommufd.fileno(), IOMMU_TEST_CMD, memory)
    return arguments.unpack_from(memory, _HEADER.size)


def _holds(question: Callable[[], object], otherwise: int) -> bool:
    """Whether the mock says so; `otherwise` is the errno by which it says that it does not."""
    try:
        question()
    except OSError as error:
        if error.errno != otherwise:
            raise
        return False
    return True


def descriptors() -> Iterator[str]:
    """What each open descriptor of iommufd is of."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one by which this is asked
            link = os.readlink(f"/proc/self/fd/{name}")
            if "iommu" in link:
                yield link


@contextmanager
def opened() -> Iterator[IommuFd]:
    """An iommufd, of which nothing is left afterwards: no device, and no descriptor."""
    with IommuFd() as iommufd:
        yield iommufd
    assert os.listdir(DEVICES) == []
    assert list(descriptors()) == []


class MockDevice(IommuObject):
    """A mock device: bound to an iommufd, and attached.

    Args:
        iommufd: what it lives in.
        under: what it is attached to at first.
        flags: what it is like.

    Attributes:
        device: it, as the iommufd sees it.
        hwpt_id: of the page table that it is attached to.
    """

    noun = "mock device"

    def __init__(self, iommufd: IommuFd, under: Table, flags: MockFlags = _PLAIN) -> None:
        number, self.hwpt_id, device_id, _ = _command(
            iommufd, _Op.MOCK_DOMAIN_FLAGS, under.id, "4I", 0, 0, 0, flags
        )
        super().__init__(iommufd, number)
        self.device = IommuDevice(iommufd, device_id)
        self._tables: dict[int, IommuObject] = {}
        self._now_under(0, under)

    def attach(self, under: Table) -> None:
        """Attaches it to another page table instead."""
        [self.hwpt_id] = _command(self.iommufd, _Op.MOCK_DOMAIN_REPLACE, self.id, "I", under.id)
        self._now_under(0, under)

    def attach_pasid(self, pasid: int, under: Table) -> None:
        """Attaches one of its PASIDs, or attaches it to another page table instead."""
        op = _Op.PASID_REPLACE if pasid in self._tables else _Op.PASID_ATTACH
        _command(self.iommufd, op, self.id, "2I", pasid, under.id)
        self._now_under(pasid, under)

    def detach_pasid(self, pasid: int) -> None:
        """Detaches a PASID, which the kernel does not do by itself when the device goes."""
        _command(self.iommufd, _Op.PASID_DETACH, self.id, "I", pasid)
        self._tables.pop(pasid).remove_user(self)

    def pasid_is_under(self, pasid: int, table: PagingHwpt | NestedHwpt | None) -> bool:
        """Whether a PASID is attached to a page table, or to none at all."""
        number = table.id if table else 0
        return _holds(
            lambda: _command(self.iommufd, _Op.PASID_CHECK_HWPT, self.id, "2I", pasid, number),
            errno.EINVAL,
        )

    def forget(self) -> None:
        for table in self._tables.values():
            table.remove_user(self)
        self._tables.clear()
        self.device.forget()
        super().forget()

    def fault(self, address: int, *, pasid: int = 0, group: int = 0, access: int = 0) -> None:
        """Has it ask for a page that it does not find, in a group of its own."""
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
        """Has its vIOMMU report an event of it, to a queue of the kind `EVENTS`."""
        _command(self.iommufd, _Op.TRIGGER_VEVENT, 0, "I", self.device.id)

    def caches(self) -> list[bool]:
        """Which entries of its cache are as they were at first."""
        return [
            _has(self.device, _Op.DEV_CHECK_CACHE, entry, CACHE_VALUE)
            for entry in range(CACHE_ENTRIES)
        ]

    def _now_under(self, pasid: int, table: IommuObject) -> None:
        table.add_user(self)
        if pasid in self._tables:
            self._tables[pasid].remove_user(self)
        self._tables[pasid] = table


class CpuAccess:
    """The way in which a driver without DMA reads and writes what an IOAS maps.

    Args:
        ioas: whose mappings it sees.
        pins: whether it pins pages, instead of copying what is in them.
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
        """What is mapped there."""
        data = bytearray(length)
        self._copy(iova, data, 0)
        return bytes(data)

    def write(self, iova: int, data: bytes) -> None:
        """Writes to what is mapped there."""
        self._copy(iova, bytearray(data), _WRITE)

    def pin(self, iova: int, length: int) -> int:
        """Pins what is mapped there, until it is unmapped; returns a number for `unpin`."""
        _, number, *_ = _command(
            self._iommufd, _Op.ACCESS_PAGES, self._fd, "2I3Q", 0, 0, iova, length, 0
        )
        return number

    def unpin(self, number: int) -> None:
        """Lets go of pages."""
        _command(self._iommufd, _Op.DESTROY_ACCESS_PAGES, self._fd, "I", number)

    def move(self, ioas: Ioas) -> None:
        """Looks at another IOAS from now on."""
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
    """Takes addresses away, as a device does that cannot use them."""
    length = where.last - where.start + 1
    _command(ioas.iommufd, _Op.ADD_RESERVED, ioas.id, "2Q", where.start, length)


def shows(hwpt: PagingHwpt | MockDevice, iova: int, buffer: Buffer) -> bool:
    """Whether a device finds the very pages of a buffer there."""
    number = hwpt.hwpt_id if isinstance(hwpt, MockDevice) else hwpt.id
    where = Exported(buffer)
    question = (hwpt.iommufd, _Op.MD_CHECK_MAP, number, "3Q", iova, where.length, where.address)
    return _holds(lambda: _command(*question), errno.EINVAL)


def pinned(iommufd: IommuFd, buffer: Buffer, times: int) -> bool:
    """Whether each page of a buffer is pinned so many times."""
    where = Exported(buffer)
    question = (iommufd, _Op.MD_CHECK_REFS, 0, "2QI", where.length, where.address, times)
    return _holds(lambda: _command(*question), errno.EIO)


def write_pages(hwpt: PagingHwpt, start: int, pages: Iterable[int]) -> None:
    """Has a device write to pages, counted from an address."""
    numbers = set(pages)
    count = max(numbers) + 1
    bits = bytearray(-(-count // 64) * 8)
    for number in numbers:
        bits[number // 8] |= 1 << number % 8
    where = Exported(bits)
    arguments = (0, start, count * mmap.PAGESIZE, mmap.PAGESIZE, where.address, 0)
    *_, written = _command(hwpt.iommufd, _Op.DIRTY, hwpt.id, "I5Q", *arguments)
    assert written == len(numbers)


def tlb(hwpt: NestedHwpt) -> list[bool]:
    """Which entries of a nested HWPT's TLB are as they were at first."""
    return [_has(hwpt, _Op.MD_CHECK_IOTLB, entry, TLB_VALUE) for entry in range(TLB_ENTRIES)]


def _has(of: IommuObject, op: _Op, entry: int, value: int) -> bool:
    question = (of.iommufd, op, of.id, "2I", entry, value)
    return _holds(lambda: _command(*question), errno.EINVAL)


def hwpt_data(tlb_value: int = TLB_VALUE) -> RawData:
    """What the mock's driver wants for a page table of the guest's."""
    return RawData(HWPT_DATA, struct.pack("=2I", tlb_value, 0))


def viommu_data(value: int) -> RawData:
    """What the mock's driver wants for a vIOMMU, and leaves its answer in."""
    return RawData(VIOMMU, struct.pack("=2I2Q", value, 0, 0, 0))


def drop_tlb(entry: int | None, *, flags: int = 0) -> RawData:
    """An invalidation of one entry of a nested HWPT's TLB, or of all."""
    everything = entry is None
    return RawData(INVALIDATION, struct.pack("=2I", flags | everything, entry or 0))


def drop_cache(virtual_id: int, entry: int | None, *, flags: int = 0) -> RawData:
    """An invalidation of one entry of a device's cache, or of all, by the number in the guest."""
    everything = entry is None
    return RawData(INVALIDATION, struct.pack("=3I", flags | everything, virtual_id, entry or 0))


def event_of(virtual_id: int) -> bytes:
    """An event of the mock: the number in the guest of the device that it is about."""
    return _EVENT.pack(virtual_id)


def readable(file: int) -> bool:
    """Whether poll(2) says that there is something to read."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def pattern(memfd: Memfd) -> bytes:
    """Fills a memfd so that no two of its words are the same."""
    data = b"".join(struct.pack("=I", number) for number in range(memfd.size // 4))
    memfd.write(data, 0)
    return data


def nesting_parent(ioas: Ioas, device: IommuDevice) -> PagingHwpt:
    """A HWPT that nested ones can stand on."""
    return device.alloc_hwpt(ioas, flags=HwptFlags.NEST_PARENT)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the capabilities and the rights of root, for this block."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """With a resource limit, for this block."""
    usual = resource.getrlimit(what)
    resource.setrlimit(what, (soft, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, usual)


@contextmanager
def forked() -> Iterator[None]:
    """While another process has every descriptor that this one has now."""
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
