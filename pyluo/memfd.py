"""Memfds: anonymous files in memory, which a live update can carry over."""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os
from typing import Self

from pyluo._sys import MMAP, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import NotPermittedError, RequestError, SealedError
from pyluo.operation import Operation, raising

__all__ = [
    "Memfd",
    "Seal",
    "forbids_executable_memfds",
    "read_at",
    "read_seals",
    "supports_seals",
]

_CLOEXEC = constant("MFD_CLOEXEC")
_ALLOW_SEALING = constant("MFD_ALLOW_SEALING")
_HUGETLB = constant("MFD_HUGETLB")
_HUGE_SHIFT = constant("MFD_HUGE_SHIFT")
_EXEC = constant("MFD_EXEC")
_NOEXEC_SEAL = constant("MFD_NOEXEC_SEAL")
_MEMFD_CREATE = Operation(
    "memfd_create",
    RequestError,
    {
        errno.EACCES: (
            NotPermittedError,
            "vm.memfd_noexec=2 forbids executable memfds. Kernels up to 7.3 carry no others over "
            "intact, so it rules out the live update of memfds: set it to 0 or 1. A memfd that is "
            "not to be preserved can be created with executable=False",
        ),
        errno.ENOMEM: "For huge pages, reserve some first: see vm.nr_hugepages",
        errno.ENODEV: "This kernel has no huge pages of that size",
    },
)
_FTRUNCATE = Operation(
    "ftruncate",
    RequestError,
    {
        errno.EPERM: SealedError,
    },
)
_ADD_SEALS_TO = Operation(
    "F_ADD_SEALS",
    RequestError,
    {
        errno.EPERM: SealedError,
    },
)
_PWRITE = Operation(
    "pwrite",
    RequestError,
    {
        errno.EPERM: SealedError,
    },
)
_ADD_SEALS = constant("F_ADD_SEALS")
_GET_SEALS = constant("F_GET_SEALS")


class Seal(enum.IntFlag):
    """The seals of a memfd: each one permanently forbids an operation.

    Source: include/uapi/linux/fcntl.h, F_SEAL_*
    """

    SEAL = constant("F_SEAL_SEAL")
    SHRINK = constant("F_SEAL_SHRINK")
    GROW = constant("F_SEAL_GROW")
    WRITE = constant("F_SEAL_WRITE")
    FUTURE_WRITE = constant("F_SEAL_FUTURE_WRITE")
    EXEC = constant("F_SEAL_EXEC")


class Memfd(OwnedFd):
    """A file of anonymous memory, such as the RAM of a guest.

    Several threads may read, write and map the file at the same time. The caller must not close the
    object while another thread uses it.
    """

    __slots__ = ()

    @classmethod
    def create(
        cls,
        name: str,
        size: int,
        *,
        seals: Seal | None = None,
        huge_page_size: int = 0,
        executable: bool = True,
    ) -> Self:
        """Create a memfd of `size` zero bytes, with close-on-exec set.

        Args:
            name: the name shown in /proc/PID/fd; at most 249 bytes. A live update does not carry
                the name over.
            size: the size in bytes; a multiple of `huge_page_size`, unless `huge_page_size` is 0.
            seals: seals to add after the size is set.
            huge_page_size: the size of the huge pages in bytes, a power of two that the machine
                supports; 0 for normal pages. Kernels up to 7.3 do not preserve huge pages.
            executable: False creates the memfd with MFD_NOEXEC_SEAL, which also works with
                vm.memfd_noexec=2. On kernels up to 7.3 such a memfd is executable and read-only
                after a live update, so a session refuses it. Kernels before 6.3 do not have this
                flag, and every memfd is executable; `seals` tells.

        Raises:
            ValueError: the size is negative or not a multiple of the huge page size, or the huge
                page size is not a power of two.
            RequestError: too many files are open (EMFILE or ENFILE); there is no memory, or too few
                huge pages are reserved (ENOMEM); the machine has no huge pages of this size
                (ENODEV);
                vm.memfd_noexec=2 forbids executable memfds (EACCES).

        Source: memfd_create(2); include/uapi/linux/memfd.h, MFD_*. Linux 3.17; seals as in `Seal`.
        """
        if size < 0:
            raise ValueError(f"a memfd of {size} bytes: the size cannot be negative")
        subject = f"memfd {name!r} of {size} bytes"
        flags = _CLOEXEC | _ALLOW_SEALING | _page_flags(huge_page_size, size)
        memfd = cls(_create(name, flags, executable, subject))
        try:
            memfd.resize(size)
            if seals:
                memfd.seal(seals)
        except BaseException:
            memfd.close()
            raise
        return memfd

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return an object that owns the open descriptor of a memfd.

        Raises:
            RequestError: the descriptor is not open (EBADF), or its file cannot have seals
                (EINVAL). The caller still owns the descriptor.
        """
        with raising("F_GET_SEALS", f"descriptor {fd}"):
            fcntl.fcntl(fd, _GET_SEALS)
        return cls(fd)

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return os.fstat(self.fileno()).st_size

    def resize(self, size: int) -> None:
        """Set the size of the file in bytes; new bytes are zero.

        Raises:
            SealedError: a seal forbids the new size, or the file is preserved (EPERM).
            RequestError: the size is not a multiple of the huge page size (EINVAL).
        """
        with _FTRUNCATE.raising(self._subject(f"to {size} bytes")):
            os.ftruncate(self.fileno(), size)

    @property
    def seals(self) -> Seal:
        """The seals of the file."""
        return Seal(fcntl.fcntl(self.fileno(), _GET_SEALS))

    def seal(self, seals: Seal) -> None:
        """Add seals; they can never be removed.

        Raises:
            SealedError: `Seal.SEAL` is set (EPERM).
            RequestError: `Seal.WRITE` cannot be added while a writable mapping exists (EBUSY).

        Source: fcntl(2), F_ADD_SEALS
        """
        with _ADD_SEALS_TO.raising(self._subject(f"{seals!r}")):
            fcntl.fcntl(self.fileno(), _ADD_SEALS, int(seals))

    def map(
        self, offset: int = 0, length: int | None = None, *, writable: bool = True
    ) -> mmap.mmap:
        """Return a shared mapping of the file, which stays valid after the memfd is closed.

        Args:
            offset: the offset of the first byte; a multiple of the page size.
            length: the length in bytes; by default the mapping reaches to the end of the file.
            writable: whether the mapping can be written to.

        Raises:
            ValueError: the range does not lie within the file.
            SealedError: the mapping is to be writable, and `Seal.WRITE` or `Seal.FUTURE_WRITE` is
                set (EPERM).
            RequestError: too few huge pages are reserved (ENOMEM).
        """
        if length is None:
            length = self.size - offset
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} do not lie within {self.size} bytes")
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        with MMAP.raising(self._subject(f"{length} bytes at {offset}")):
            return mmap.mmap(self.fileno(), length, access=access, offset=offset)

    def read(self, length: int, offset: int) -> bytes:
        """Return `length` bytes from `offset`, or fewer if the file ends before.

        The file position is neither used nor changed.
        """
        return read_at(self.fileno(), length, offset)

    def write(self, data: bytes | bytearray | memoryview | mmap.mmap, offset: int) -> None:
        """Write all of `data` at `offset`; the file grows if necessary.

        The file position is neither used nor changed. If the write fails half-way, the bytes
        already written stay in the file.

        Raises:
            SealedError: a seal forbids the write, or a preserved file would have to grow (EPERM).
            RequestError: there is no memory (ENOSPC).
        """
        view = memoryview(data).cast("B")
        with _PWRITE.raising(self._subject(f"{len(view)} bytes at {offset}")):
            while view:
                written = os.pwrite(self.fileno(), view, offset)
                view = view[written:]
                offset += written

    def _subject(self, what: str) -> str:
        return f"memfd (descriptor {self.fileno()}): {what}"


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Return `length` bytes of a file from `offset`, or fewer if the file ends before.

    The file position is neither used nor changed.
    """
    chunks = []
    while length:
        chunk = os.pread(fd, min(length, 1 << 30), offset)
        if not chunk:
            break
        chunks.append(chunk)
        length -= len(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def supports_seals(fd: int) -> bool:
    """Return whether a file can have seals, as memfds and files on a tmpfs or hugetlbfs can."""
    try:
        fcntl.fcntl(fd, _GET_SEALS)
    except OSError:
        return False
    return True


def read_seals(fd: int) -> Seal:
    """Return the seals of a file; no seals if the file cannot have any or is not open."""
    try:
        return Seal(fcntl.fcntl(fd, _GET_SEALS))
    except (OSError, ValueError):
        return Seal(0)


def _page_flags(huge_page_size: int, size: int) -> int:
    if not huge_page_size:
        return 0
    if huge_page_size < 0 or huge_page_size & (huge_page_size - 1):
        raise ValueError(f"a huge page of {huge_page_size} bytes: not a power of two")
    if size % huge_page_size:
        raise ValueError(f"{size} bytes are not a multiple of a huge page of {huge_page_size}")
    return _HUGETLB | (huge_page_size.bit_length() - 1) << _HUGE_SHIFT


def _create(name: str, flags: int, executable: bool, subject: str) -> int:
    """Call memfd_create(2) with MFD_EXEC or MFD_NOEXEC_SEAL; return the descriptor.

    Without either flag the sysctl vm.memfd_noexec would decide. Kernels before 6.3 know neither
    flag and always create executable memfds, so the memfd is then created without one.
    """
    try:
        return os.memfd_create(name, flags | (_EXEC if executable else _NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _MEMFD_CREATE.error(error.errno or errno.EIO, subject) from None
    with _MEMFD_CREATE.raising(subject):
        return os.memfd_create(name, flags)


def forbids_executable_memfds() -> bool:
    """Return whether vm.memfd_noexec=2 forbids executable memfds in this PID namespace.

    Source: Documentation/admin-guide/sysctl/vm.rst, memfd_noexec. Linux 6.3.
    """
    try:
        with open("/proc/sys/vm/memfd_noexec") as file:
            return int(file.read()) >= 2
    except OSError:
        return False
