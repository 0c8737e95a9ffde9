"""`Ioas`: an I/O address space, which maps memory for DMA by devices."""

from __future__ import annotations

import errno
import itertools
import os
import warnings
from operator import attrgetter
from typing import TYPE_CHECKING

from pyluo._sys import Exported, Ioctl, Struct, constant
from pyluo.errors import NotPermittedError, RequestError
from pyluo.exclusive import exclusively
from pyluo.iommufd.iova import Access, IovaRange, IovaRanges, Mapping
from pyluo.iommufd.objects import IommuObject
from pyluo.iommufd.requests import LOCKED_MEMORY, iommu_ioctl
from pyluo.operation import raising

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable

    from pyluo._sys import Request
    from pyluo.descriptor import HasFileno
    from pyluo.guest_ram import GuestRam
    from pyluo.iommufd.objects import IommuContext

__all__ = ["Ioas"]

_UNMAPPABLE = (
    "The address or the length is not a multiple of the alignment, or the range is not within "
    "`Ioas.iova_ranges`"
)
_MAPPED_ALREADY = "Unmap that memory first, or let the kernel choose the address"
_NO_IOVA = "`Ioas.iova_ranges` have no free gap of this size"
_TOO_LATE = "Huge pages can be turned off only before a device can access the mappings"
_ALLOW_IOVAS = iommu_ioctl(
    "IOMMU_IOAS_ALLOW_IOVAS",
    "iommu_ioas_allow_iovas",
    {
        errno.EADDRINUSE: (
            "An attached device cannot reach the whole range, see `Ioas.iova_ranges`"
        ),
    },
)
_IOVA_RANGES = iommu_ioctl("IOMMU_IOAS_IOVA_RANGES", "iommu_ioas_iova_ranges")
_MAP = iommu_ioctl(
    "IOMMU_IOAS_MAP",
    "iommu_ioas_map",
    {
        errno.EEXIST: _MAPPED_ALREADY,
        errno.EINVAL: _UNMAPPABLE,
        errno.ENOMEM: LOCKED_MEMORY,
        errno.ENOSPC: _NO_IOVA,
    },
)
_MAP_FILE = iommu_ioctl(
    "IOMMU_IOAS_MAP_FILE",
    "iommu_ioas_map_file",
    {
        errno.EEXIST: _MAPPED_ALREADY,
        errno.EINVAL: _UNMAPPABLE + "; or the kernel cannot map this kind of file: use a memfd",
        errno.ENOMEM: LOCKED_MEMORY,
        errno.ENOSPC: _NO_IOVA,
    },
)
_COPY = iommu_ioctl(
    "IOMMU_IOAS_COPY",
    "iommu_ioas_copy",
    {
        errno.EEXIST: _MAPPED_ALREADY,
        errno.EINVAL: _UNMAPPABLE,
        errno.ENOSPC: _NO_IOVA,
        errno.ENOENT: "The range is not fully mapped in the source",
        errno.EPERM: "The source was mapped without write access",
    },
)
_UNMAP = iommu_ioctl(
    "IOMMU_IOAS_UNMAP",
    "iommu_ioas_unmap",
    {
        errno.ENOENT: (
            "Nothing is mapped there, or a mapping reaches beyond the range: mappings can"
            " only be unmapped as a whole"
        ),
        errno.EBUSY: "A hardware queue uses the mapping, or another thread is unmapping it",
    },
)
_OPTION = iommu_ioctl(
    "IOMMU_OPTION",
    "iommu_option",
    {errno.EINVAL: _TOO_LATE, errno.EADDRINUSE: _TOO_LATE},
)
_GET_PA = iommu_ioctl(
    "IOMMU_IOAS_NOIOMMU_GET_PA",
    "iommu_ioas_noiommu_get_pa",
    {
        errno.EPERM: (
            NotPermittedError,
            "This needs CAP_SYS_RAWIO",
        ),
        errno.ENOENT: "Nothing is mapped there",
    },
)
_RANGE = Struct("iommu_iova_range")

_FIXED_IOVA = constant("IOMMU_IOAS_MAP_FIXED_IOVA")
_HUGE_PAGES = constant("IOMMU_OPTION_HUGE_PAGES")
_OP_SET = constant("IOMMU_OPTION_OP_SET")
_OP_GET = constant("IOMMU_OPTION_OP_GET")
_MAX_LENGTH = (1 << 64) - 1
_FIRST_GUESS = 16  # ranges
_READ_WRITE = Access.READ | Access.WRITE
# The buffers that are mapped, by the serial number of the `Ioas` and the IOVA. A buffer leaves this
# table only when it is known to be unmapped. So it outlives an `Ioas` that is dropped, and an
# exception that comes before it could be unmapped.
_anchored: dict[tuple[int, int], Exported] = {}
_serials = itertools.count()


class Ioas(IommuObject):
    """An I/O address space. Devices are attached to it, or to a HWPT allocated for it.

    The kernel keeps mapped files. Memory that is mapped by its address, this object keeps: a buffer
    cannot be freed or resized until it is unmapped, and closing the iommufd unmaps it.

    Attributes:
        allowed: the ranges last given to `allow_iovas`.
    """

    noun = "IOAS"

    def __init__(self, iommufd: IommuContext, object_id: int) -> None:
        super().__init__(iommufd, object_id)
        self._serial = next(_serials)
        # For each IOVA: the mapping, and the buffer if memory is mapped by its address.
        self._mapped: dict[int, tuple[Mapping, Exported | None]] = {}
        # Functions that bring `_mapped` up to date with requests. There is one during a request,
        # and later if an exception in a signal handler has interrupted the request.
        self._unsettled: list[Callable[[], None]] = []
        self.allowed: tuple[IovaRange, ...] = ()

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """The mappings that this object made or that `adopt` added, sorted by address."""
        return self._get_mappings()

    @exclusively
    def _get_mappings(self) -> tuple[Mapping, ...]:
        self._settle()
        return tuple(mapping for _, (mapping, _) in sorted(self._mapped.items()))

    @property
    def own_memory(self) -> tuple[IovaRange, ...]:
        """The ranges at which this process mapped its memory by address, and not by file."""
        return tuple(mapping.range for mapping in self._find_own_memory())

    def unmap_own_memory(self) -> None:
        """Unmap what is in `own_memory`, so that the process may free the memory.

        If the kernel cannot unmap a range, because a hardware queue uses it, the buffer is kept
        until the process ends.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_UNMAP. Linux 6.2.
        """
        for mapping in self._find_own_memory():
            reply = _UNMAP.attempt(
                self._iommufd.fileno(), ioas_id=self._id, iova=mapping.iova, length=mapping.length
            )
            if not reply.errno or not self._is_mapped(mapping.range):
                self._drop(mapping.iova)
                continue
            del self._mapped[mapping.iova]
            what = f"{mapping.range} of {self} could not be unmapped"
            warnings.warn(f"{what}: the memory is kept", ResourceWarning, stacklevel=2)

    def _keep(self, mapping: Mapping, memory: Exported | None) -> None:
        """Add a mapping, and keep the memory if it is mapped by its address."""
        if memory is not None:
            _anchored[self._serial, mapping.iova] = memory
        self._mapped[mapping.iova] = mapping, memory

    def _drop(self, iova: int) -> None:
        """Remove a mapping that no longer exists, and release the memory."""
        self._mapped.pop(iova, None)
        _anchored.pop((self._serial, iova), None)

    def _find_own_memory(self) -> list[Mapping]:
        """Return what this process has mapped by address: a child has only copies of its parent's.

        The pages that a device writes to stay those of the process that mapped them.
        """
        self._settle()
        return [
            mapping
            for _, (mapping, memory) in sorted(self._mapped.items())
            if memory is not None and memory.pid == os.getpid()
        ]

    def forget(self) -> None:
        """Note that the kernel has destroyed the IOAS, and release the mapped memory."""
        super().forget()
        self._unsettled.clear()
        for iova in list(self._mapped):
            self._drop(iova)

    def iova_ranges(self) -> IovaRanges:
        """Return the ranges in which memory can be mapped; attaching and detaching changes them.

        Raises:
            IommuError: the IOAS was destroyed (ENOENT).

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_IOVA_RANGES. Linux 6.2.
        """
        room = _FIRST_GUESS
        while True:
            array = bytearray(room * _RANGE.size)
            reply = _IOVA_RANGES.attempt(
                self._iommufd.fileno(), ioas_id=self.id, num_iovas=room, allowed_iovas=array
            )
            count = reply.integer("num_iovas")
            if reply.errno == errno.EMSGSIZE and count > room:
                room = count  # the kernel reported this many ranges; there may be more by now
                continue
            if reply.errno:
                raise _IOVA_RANGES.error(reply.errno, str(self))
            found = (_RANGE.unpack(array, index * _RANGE.size) for index in range(count))
            ranges = tuple(IovaRange(one.integer("start"), one.integer("last")) for one in found)
            return IovaRanges(ranges, reply.integer("out_iova_alignment"))

    @exclusively
    def allow_iovas(self, ranges: Iterable[IovaRange]) -> None:
        """Set the ranges that must stay mappable.

        A device that cannot reach all of these ranges cannot be attached, and the kernel chooses
        addresses only from these ranges. The ranges replace those of an earlier call. An empty list
        removes the restriction.

        Raises:
            IommuError: an attached device, or its IOMMU, cannot reach all of a range (EADDRINUSE);
                ranges overlap, or a range ends before it starts (EINVAL).

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_ALLOW_IOVAS. Linux 6.2.
        """
        wanted = list(ranges)
        array = b"".join(_RANGE.pack(start=one.start, last=one.last) for one in wanted)
        _ALLOW_IOVAS(
            self._iommufd.fileno(),
            f"{self}: {', '.join(map(str, wanted)) or 'everything'}",
            ioas_id=self.id,
            num_iovas=len(wanted),
            allowed_iovas=array or 0,
        )
        self.allowed = tuple(wanted)

    @exclusively
    def map(
        self,
        buffer: bytearray | memoryview | mmap.mmap,
        *,
        iova: int | None = None,
        access: Access = _READ_WRITE,
    ) -> Mapping:
        """Map memory of this process by its address.

        Such a mapping cannot be handed over to another process; a mapping of `map_file` can.

        Args:
            buffer: the memory to map, for example the result of `Memfd.map`. The buffer cannot be
                closed or resized until it is unmapped.
            iova: the first IOVA; by default the kernel chooses.
            access: whether devices may read and write the memory.

        Raises:
            IommuError: memory is already mapped at this IOVA (EEXIST); the IOVA is not aligned or
                not in `iova_ranges` (EINVAL); no range is large enough (ENOSPC); RLIMIT_MEMLOCK is
                exceeded, or there is too little memory (ENOMEM); the buffer is read-only memory
                (EFAULT).
            TypeError: the buffer is read-only, but `access` includes writing.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP. Linux 6.2.
        """
        exported = Exported(buffer, writable=Access.WRITE in access)
        try:
            request = _MAP.prepare(
                flags=int(access) | _iova_flag(iova),
                ioas_id=self.id,
                user_va=exported.address,
                length=exported.length,
                iova=iova or 0,
            )
        except (TypeError, ValueError):
            exported.release()  # otherwise the exception's traceback would keep the buffer alive
            raise
        subject = f"{self}: {exported.length} bytes{_iova_suffix(iova)}"
        return self._map(_MAP, request, subject, access, None, 0, exported)

    @exclusively
    def map_file(
        self,
        file: HasFileno,
        *,
        offset: int = 0,
        length: int | None = None,
        iova: int | None = None,
        access: Access = _READ_WRITE,
    ) -> Mapping:
        """Map a file: a memfd, or a dma-buf that a VFIO device exported.

        Args:
            file: the file, whose descriptor may be closed afterwards.
            offset: the offset in the file at which the mapping begins, in bytes.
            length: the length in bytes; by default the mapping reaches to the end of the file.
            iova: the first IOVA; by default the kernel chooses.
            access: whether devices may read and write the memory.

        Raises:
            ValueError: the range does not lie within the file; or the IOVA is not one of 64 bits.
            IommuError: memory is already mapped at this IOVA (EEXIST); the IOVA or the length is
                not aligned or not in `iova_ranges`, or the kernel cannot map this kind of file
                (EINVAL); no range is large enough (ENOSPC); RLIMIT_MEMLOCK is exceeded, or there is
                too little memory (ENOMEM).

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP_FILE. Linux 6.13; dma-bufs since 6.19.
        """
        return self._map_file(file, offset, length, iova, access)

    def _map_file(
        self, file: HasFileno, offset: int, length: int | None, iova: int | None, access: Access
    ) -> Mapping:
        with raising("fstat", "the file to map"):
            stat = os.fstat(file.fileno())
        size = stat.st_size
        length = size - offset if length is None else length
        if offset < 0 or length <= 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} do not lie within {size} bytes")
        request = _MAP_FILE.prepare(
            flags=int(access) | _iova_flag(iova),
            ioas_id=self.id,
            fd=file.fileno(),
            start=offset,
            length=length,
            iova=iova or 0,
        )
        subject = (
            f"{self}: {length} bytes of descriptor {file.fileno()} from {offset}"
            f"{_iova_suffix(iova)}"
        )
        identity = (stat.st_dev, stat.st_ino)
        return self._map(_MAP_FILE, request, subject, access, identity, offset, None)

    def _map(
        self,
        ioctl: Ioctl,
        request: Request,
        subject: str,
        access: Access,
        file: tuple[int, int] | None,
        offset: int,
        memory: Exported | None,
    ) -> Mapping:
        def note() -> None:
            if request.succeeded:
                iova, length = request.integer("iova"), request.integer("length")
                self._keep(Mapping(iova, length, access, file, offset), memory)
            elif memory is not None:
                memory.release()

        self._carry_out(ioctl, request, subject, note)
        return self._mapped[request.integer("iova")][0]

    @exclusively
    def map_ram(
        self,
        ram: GuestRam,
        *,
        iova: int,
        offset: int = 0,
        length: int | None = None,
        access: Access = _READ_WRITE,
    ) -> IovaRange:
        """Map a guest's RAM, or a range of it, with one request for each of its memfds.

        If a request fails, the mappings of the requests before it are removed. The IOAS keeps a
        reference to each memfd until it is unmapped, but the RAM may be closed.

        Args:
            ram: the RAM.
            iova: the first IOVA. The mappings of the memfds follow each other without a gap.
            offset: the offset in the RAM at which the range begins, in bytes.
            length: the length in bytes; by default the range reaches to the end of the RAM.
            access: whether devices may read and write the memory.

        Returns:
            The range of IOVAs, which `unmap` takes. `mappings` has one mapping for each memfd.

        Raises:
            ValueError: the range is empty or does not lie within the RAM, or its IOVAs exceed 64
                bits.
            IommuError: see `map_file`. Notes of the error name the mappings that could not be
                removed, if any.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP_FILE. Linux 6.13.
        """
        pieces = ram.pieces(offset, length)
        if not pieces:
            raise ValueError(f"no bytes at {offset} to map")
        wanted = IovaRange(iova, iova + sum(piece.length for piece in pieces) - 1)
        self._settle()
        before = set(self._mapped)
        start = iova
        try:
            for piece in pieces:
                self._map_file(piece.memfd, piece.offset, piece.length, start, access)
                start += piece.length
        except BaseException as error:
            self._settle()
            for made in set(self._mapped) - before:
                where = self._mapped[made][0].range
                try:
                    self._unmap(where, f"{self}: {where}")
                except RequestError as failed:
                    error.add_note(f"{where} could not be unmapped: {failed}")
            raise
        return wanted

    @exclusively
    def copy(
        self,
        source: Ioas,
        wanted: IovaRange,
        *,
        iova: int | None = None,
        access: Access = _READ_WRITE,
    ) -> IovaRange:
        """Map memory that is mapped in another IOAS of the iommufd, without pinning it again.

        Args:
            source: the IOAS that has the mappings; it may be this one.
            wanted: the range of IOVAs in `source`, all of which must be mapped.
            iova: the first IOVA in this IOAS; by default the kernel chooses.
            access: whether devices may read and write the memory.

        Returns:
            The range of IOVAs in this IOAS.

        Raises:
            IommuError: memory is already mapped at this IOVA (EEXIST); part of the range is not
                mapped (ENOENT); `access` includes writing, but the memory was mapped without it
                (EPERM); for EINVAL and ENOSPC see `map`.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_COPY. Linux 6.2.
        """
        request = _COPY.prepare(
            flags=int(access) | _iova_flag(iova),
            dst_ioas_id=self.id,
            src_ioas_id=source.id_in(self._iommufd),
            length=wanted.length,
            dst_iova=iova or 0,
            src_iova=wanted.start,
        )
        source._settle()
        copied = [
            (mapping, memory)
            for mapping, memory in source._mapped.values()
            if mapping.range.overlaps(wanted)
        ]

        def note() -> None:
            if not request.succeeded:
                return
            for mapping, memory in copied:
                first = max(mapping.iova, wanted.start)
                last = min(mapping.range.last, wanted.last)
                new = Mapping(
                    request.integer("dst_iova") + first - wanted.start,
                    last - first + 1,
                    access,
                    mapping.file,
                    mapping.offset + first - mapping.iova,
                )
                self._keep(new, memory)

        subject = f"{self}: {wanted} of {source}{_iova_suffix(iova)}"
        self._carry_out(_COPY, request, subject, note)
        start = request.integer("dst_iova")
        return IovaRange(start, start + wanted.length - 1)

    @exclusively
    def unmap(self, wanted: Mapping | IovaRange) -> int:
        """Unmap all mappings that lie within a range.

        Returns:
            The number of bytes that were unmapped.

        Raises:
            IommuError: nothing is mapped in the range, or a mapping lies only partly in it, and the
                kernel does not split mappings (ENOENT); a hardware queue still uses a mapping
                (EBUSY). Other mappings in the range may be unmapped: see `mappings`.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_UNMAP. Linux 6.2.
        """
        where = wanted.range if isinstance(wanted, Mapping) else wanted
        return self._unmap(where, f"{self}: {where}")

    @exclusively
    def unmap_all(self) -> int:
        """Unmap all mappings of the IOAS.

        Returns:
            The number of bytes that were unmapped.

        Raises:
            IommuError: a hardware queue still uses a mapping (EBUSY). Other mappings may be
                unmapped: see `mappings`.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_UNMAP. Linux 6.2.
        """
        return self._unmap(IovaRange(0, _MAX_LENGTH), str(self))

    def maps(self, where: IovaRange) -> bool:
        """Return whether memory is mapped at all IOVAs of a range, by this process or another.

        The kernel is asked to copy the mappings of the range onto the range itself, which never
        succeeds. If all of the range is mapped, the target is in use; otherwise the error is
        ENOENT.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_COPY. Linux 6.2.
        """
        self.id  # noqa: B018  # raises ValueError if the IOAS is destroyed
        return self._is_mapped(where)

    def _is_mapped(self, where: IovaRange) -> bool:
        reply = _COPY.attempt(
            self._iommufd.fileno(),
            flags=int(Access.READ) | _FIXED_IOVA,
            dst_ioas_id=self._id,
            src_ioas_id=self._id,
            length=where.length,
            dst_iova=where.start,
            src_iova=where.start,
        )
        return reply.errno != errno.ENOENT

    @property
    def huge_pages(self) -> bool:
        """Whether page tables may map adjacent pages as one huge page; True for a new IOAS.

        Raises:
            IommuError: False is set too late, when a device already has access to mappings
                (EINVAL), or when a mapping is not aligned to pages (EADDRINUSE).

        Source: include/uapi/linux/iommufd.h, IOMMU_OPTION, IOMMU_OPTION_HUGE_PAGES. Linux 6.2.
        """
        reply = _OPTION(
            self._iommufd.fileno(), str(self), option_id=_HUGE_PAGES, op=_OP_GET, object_id=self.id
        )
        return bool(reply.integer("val64"))

    @huge_pages.setter
    def huge_pages(self, combined: bool) -> None:
        _OPTION(
            self._iommufd.fileno(),
            str(self),
            option_id=_HUGE_PAGES,
            op=_OP_SET,
            object_id=self.id,
            val64=int(combined),
        )

    def noiommu_get_pa(self, iova: int, length: int) -> tuple[int, int]:
        """Return the physical address behind an IOVA, for a device without an IOMMU.

        Args:
            iova: the IOVA to look up.
            length: the largest number of bytes to look up.

        Returns:
            The physical address, and the number of bytes from there that are contiguous in physical
            memory, at most `length`.

        Raises:
            NotPermittedError: the caller lacks CAP_SYS_RAWIO (EPERM).
            KernelTooOldError: the kernel has no such request (ENOTTY).
            IommuError: nothing is mapped at the IOVA (ENOENT); devices with an IOMMU are attached
                to the IOAS (EOPNOTSUPP).

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_NOIOMMU_GET_PA. Linux 7.3.
        """
        reply = _GET_PA(
            self._iommufd.fileno(),
            f"{self}: {iova:#x}",
            ioas_id=self.id,
            iova=iova,
            length=length,
        )
        return reply.integer("out_phys"), reply.integer("length")

    @exclusively
    def adopt(self, mappings: Iterable[Mapping]) -> None:
        """Add mappings of files that another process made to `mappings`; the kernel is not asked.

        Raises:
            ValueError: a mapping overlaps another one; nothing was added.
        """
        self._settle()
        wanted = list(mappings)
        known = (mapping for mapping, _ in self._mapped.values())
        ranges = sorted((mapping.range for mapping in (*known, *wanted)), key=attrgetter("start"))
        for one, other in itertools.pairwise(ranges):
            if one.overlaps(other):
                raise ValueError(f"{other} overlaps {one}")
        self._mapped.update({mapping.iova: (mapping, None) for mapping in wanted})

    def _carry_out(
        self, ioctl: Ioctl, request: Request, subject: str, note: Callable[[], None]
    ) -> None:
        """Make a request that changes the mappings.

        Args:
            ioctl: the ioctl.
            request: the request, prepared.
            subject: words for the object of the request, for the message of an error.
            note: a function that brings `_mapped` up to date with the outcome of the request. It
                runs before anything else uses `_mapped`, even if a signal handler raises; it may
                run twice.
        """
        fd = self._iommufd.fileno()
        self._settle()
        self._unsettled.append(note)
        request.attempt(fd)
        self._settle()
        if request.errno:
            raise ioctl.error(request.errno, subject)

    def _settle(self) -> None:
        while self._unsettled:
            self._unsettled[0]()
            del self._unsettled[0]

    def _unmap(self, where: IovaRange, subject: str) -> int:
        self._settle()
        if where.start in self._mapped and self._mapped[where.start][0].range == where:
            within = [self._mapped[where.start][0]]
        else:
            within = [mapping for mapping, _ in self._mapped.values() if mapping.range in where]
        # 2^64 does not fit into the field; to the kernel, 2^64 - 1 means the whole address space.
        length = min(where.length, _MAX_LENGTH)
        request = _UNMAP.prepare(ioas_id=self.id, iova=where.start, length=length)

        def note() -> None:
            for mapping in within:
                # A request that fails may have unmapped some mappings, so check which ones remain.
                if request.succeeded or (request.errno and not self._is_mapped(mapping.range)):
                    self._drop(mapping.iova)

        self._carry_out(_UNMAP, request, subject, note)
        return request.integer("length")


def _iova_flag(iova: int | None) -> int:
    return 0 if iova is None else _FIXED_IOVA


def _iova_suffix(iova: int | None) -> str:
    return "" if iova is None else f" at {iova:#x}"
