"""I/O address spaces: what a device may reach by DMA, and at which address."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyluo._sys import Exported, Ioctl, Struct, constant, raising
from pyluo.errors import LuoError, from_errno
from pyluo.iommufd.iova import Access, IovaRange, IovaRanges, Mapping
from pyluo.iommufd.objects import IommuObject

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Iterator

    from pyluo.descriptor import HasFileno
    from pyluo.iommufd.objects import IommuContext

__all__ = ["Ioas"]

_ALLOW_IOVAS = Ioctl("IOMMU_IOAS_ALLOW_IOVAS", "iommu_ioas_allow_iovas")
_IOVA_RANGES = Ioctl("IOMMU_IOAS_IOVA_RANGES", "iommu_ioas_iova_ranges")
_MAP = Ioctl("IOMMU_IOAS_MAP", "iommu_ioas_map")
_MAP_FILE = Ioctl("IOMMU_IOAS_MAP_FILE", "iommu_ioas_map_file")
_COPY = Ioctl("IOMMU_IOAS_COPY", "iommu_ioas_copy")
_UNMAP = Ioctl("IOMMU_IOAS_UNMAP", "iommu_ioas_unmap")
_OPTION = Ioctl("IOMMU_OPTION", "iommu_option")
_GET_PA = Ioctl("IOMMU_IOAS_NOIOMMU_GET_PA", "iommu_ioas_noiommu_get_pa")
_RANGE = Struct("iommu_iova_range")

_FIXED_IOVA = constant("IOMMU_IOAS_MAP_FIXED_IOVA")
_HUGE_PAGES = constant("IOMMU_OPTION_HUGE_PAGES")
_OP_SET = constant("IOMMU_OPTION_OP_SET")
_OP_GET = constant("IOMMU_OPTION_OP_GET")
_EVERYTHING = (1 << 64) - 1
_FIRST_GUESS = 16  # of the number of ranges
_READ_WRITE = Access.READ | Access.WRITE


class Ioas(IommuObject):
    """An I/O address space. Devices are attached to it, or to a HWPT made from it.

    What is mapped stays referred to, and a buffer cannot be freed, until it is unmapped, the IOAS
    is destroyed or its iommufd closed.

    Attributes:
        allowed: what `allow_iovas` was last told.
    """

    noun = "IOAS"

    def __init__(self, iommufd: IommuContext, object_id: int) -> None:
        super().__init__(iommufd, object_id)
        self._mapped: dict[int, tuple[Mapping, object]] = {}  # by IOVA, with what is kept alive
        self._doubtful: list[object] = []  # what may be mapped, as no request said
        self.allowed: tuple[IovaRange, ...] = ()

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """What is mapped, as far as this object did it or was told, in the order of addresses."""
        return tuple(mapping for _, (mapping, _) in sorted(self._mapped.items()))

    @property
    def known(self) -> bool:
        """Whether `mappings` is sure: no request was cut short by an exception of a signal's.

        `unmap_all` makes it sure again.
        """
        return not self._doubtful

    @property
    def mapped_by_address(self) -> tuple[IovaRange, ...]:
        """Where memory is mapped by its address in a process, as far as this object did it."""
        return tuple(mapping.range for mapping in self.mappings if mapping.file is None)

    def forget(self) -> None:
        """Notes that it is gone; lets go of what was mapped."""
        super().forget()
        self._mapped.clear()
        self._doubtful.clear()

    def iova_ranges(self) -> IovaRanges:
        """Where something can be mapped; ask again after each attach and detach.

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
                room = count  # the kernel says how many there are; there may be more by now
                continue
            if reply.errno:
                raise from_errno(reply.errno, _IOVA_RANGES.name, str(self))
            found = (_RANGE.unpack(array, index * _RANGE.size) for index in range(count))
            ranges = tuple(IovaRange(one.integer("start"), one.integer("last")) for one in found)
            return IovaRanges(ranges, reply.integer("out_iova_alignment"))

    def allow_iovas(self, ranges: Iterable[IovaRange]) -> None:
        """Sets what must stay possible to map; attaching a device that would narrow it then fails.

        Addresses that the kernel chooses are taken from these ranges. They replace those of an
        earlier call; none at all lifts the rule.

        Raises:
            LuoError: EADDRINUSE, an attached device, or its IOMMU, does not have the whole of a
                range; EINVAL, ranges overlap or end before they start.

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

    def map(
        self,
        buffer: bytearray | memoryview | mmap.mmap,
        *,
        iova: int | None = None,
        access: Access = _READ_WRITE,
    ) -> Mapping:
        """Maps memory of this process by its address.

        Such a mapping cannot be handed over to another process: `map_file` can.

        Args:
            buffer: of which all is mapped; such as what `Memfd.map` returns. It cannot be closed or
                resized until it is unmapped.
            iova: where to; without it the kernel chooses.
            access: what devices may do with it.

        Raises:
            IovaInUseError: EEXIST, something is mapped there.
            LuoError: EINVAL, the address is not aligned or not in `iova_ranges`; ENOSPC, no room
                for it; ENOMEM, beyond RLIMIT_MEMLOCK, or no memory; EFAULT, the buffer is
                read-only memory.
            TypeError: the buffer is read-only, and the access is not.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP. Linux 6.2.
        """
        exported = Exported(buffer, writable=Access.WRITE in access)
        try:
            with self._doubting(exported):
                reply = _MAP(
                    self._iommufd.fileno(),
                    f"{self}: {exported.length} bytes{_at(iova)}",
                    flags=int(access) | _fixed(iova),
                    ioas_id=self.id,
                    user_va=exported.address,
                    length=exported.length,
                    iova=iova or 0,
                )
        except LuoError:
            exported.release()  # or whoever looks at the error could not free the buffer
            raise
        return self._keep(
            Mapping(reply.integer("iova"), exported.length, access, None, 0), exported
        )

    def map_file(
        self,
        file: HasFileno,
        *,
        offset: int = 0,
        length: int | None = None,
        iova: int | None = None,
        access: Access = _READ_WRITE,
    ) -> Mapping:
        """Maps a file: a memfd, or a dma-buf that a VFIO device exported.

        Args:
            file: kept until it is unmapped. Closing it does no harm.
            offset: of the first byte, in bytes.
            length: in bytes; without it, up to the end of the file.
            iova: where to; without it the kernel chooses.
            access: what devices may do with it.

        Raises:
            ValueError: the range does not lie within the file.
            IovaInUseError: EEXIST, something is mapped there.
            LuoError: EINVAL, the address or the length is not aligned or not in `iova_ranges`, or
                the kernel cannot map this kind of file; ENOSPC, no room for it; ENOMEM, beyond
                RLIMIT_MEMLOCK, or no memory.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP_FILE. Linux 6.13; a dma-buf since 6.19.
        """
        with raising("fstat", "the file to map"):
            stat = os.fstat(file.fileno())
        size = stat.st_size
        length = size - offset if length is None else length
        if offset < 0 or length <= 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} do not lie within {size} bytes")
        with self._doubting(file):
            reply = _MAP_FILE(
                self._iommufd.fileno(),
                f"{self}: {length} bytes of descriptor {file.fileno()} from {offset}{_at(iova)}",
                flags=int(access) | _fixed(iova),
                ioas_id=self.id,
                fd=file.fileno(),
                start=offset,
                length=length,
                iova=iova or 0,
            )
        identity = (stat.st_dev, stat.st_ino)
        return self._keep(Mapping(reply.integer("iova"), length, access, identity, offset), file)

    def copy(
        self,
        source: Ioas,
        wanted: IovaRange,
        *,
        iova: int | None = None,
        access: Access = _READ_WRITE,
    ) -> IovaRange:
        """Maps what another IOAS of this iommufd has mapped, without pinning it a second time.

        Args:
            source: the other one; it may be this one.
            wanted: a range of it, with no hole in what is mapped there.
            iova: where to; without it the kernel chooses.
            access: what devices may do with it.

        Returns:
            Where it is now.

        Raises:
            IovaInUseError: EEXIST, something is mapped there.
            LuoError: ENOENT, not all of it is mapped; EPERM, write access to what was mapped
                without; EINVAL and ENOSPC as for `map`.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_COPY. Linux 6.2.
        """
        kept = list(source._mapped.values())
        with self._doubting(kept):
            reply = _COPY(
                self._iommufd.fileno(),
                f"{self}: {wanted} of {source}{_at(iova)}",
                flags=int(access) | _fixed(iova),
                dst_ioas_id=self.id,
                src_ioas_id=source.id_in(self._iommufd),
                length=wanted.length,
                dst_iova=iova or 0,
                src_iova=wanted.start,
            )
        start = reply.integer("dst_iova")
        for mapping, what in kept:
            first = max(mapping.iova, wanted.start)
            last = min(mapping.range.last, wanted.last)
            if first <= last:
                self._keep(
                    Mapping(
                        start + first - wanted.start,
                        last - first + 1,
                        access,
                        mapping.file,
                        mapping.offset + first - mapping.iova,
                    ),
                    what,
                )
        return IovaRange(start, start + wanted.length - 1)

    def unmap(self, wanted: Mapping | IovaRange) -> int:
        """Unmaps all mappings that lie within a range.

        Returns:
            How many bytes were mapped there.

        Raises:
            LuoError: ENOENT, nothing is mapped there, or a mapping lies there in part: none can be
                cut; EBUSY, a hardware queue still uses one. Those before the one that failed may be
                gone: see `mappings`.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_UNMAP. Linux 6.2.
        """
        where = wanted.range if isinstance(wanted, Mapping) else wanted
        return self._unmap(where, f"{self}: {where}")

    def unmap_all(self) -> int:
        """Unmaps everything.

        Returns:
            How many bytes were mapped.

        Raises:
            LuoError: EBUSY, a hardware queue still uses some of it. What comes before that may be
                gone: see `mappings`.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_UNMAP. Linux 6.2.
        """
        unmapped = self._unmap(IovaRange(0, _EVERYTHING), str(self))
        self._doubtful.clear()
        return unmapped

    def maps(self, where: IovaRange) -> bool:
        """Whether all of a range is mapped, by this process or another.

        The kernel is asked to copy the range onto itself. It never does: what is mapped is in the
        way, and what is not cannot be copied.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_COPY. Linux 6.2.
        """
        reply = _COPY.attempt(
            self._iommufd.fileno(),
            flags=int(Access.READ) | _FIXED_IOVA,
            dst_ioas_id=self.id,
            src_ioas_id=self.id,
            length=where.length,
            dst_iova=where.start,
            src_iova=where.start,
        )
        return reply.errno != errno.ENOENT

    @property
    def huge_pages(self) -> bool:
        """Whether the page tables may combine pages that lie side by side; True at first.

        Raises:
            LuoError: EINVAL, switching it off comes too late, a device has the pages already;
                EADDRINUSE, something smaller than a page is mapped.

        Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_HUGE_PAGES. Linux 6.2.
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
        """The physical address of what is mapped, for a device that no IOMMU stands before.

        Args:
            iova: where the question starts.
            length: in bytes, how far it goes.

        Returns:
            The physical address, and for how many bytes from there memory is contiguous, at most
            `length`.

        Raises:
            LuoPermissionError: EPERM, it needs CAP_SYS_RAWIO.
            KernelTooOldError: ENOTTY.
            LuoError: ENOENT, nothing is mapped there; EOPNOTSUPP, the IOAS serves devices that
                have an IOMMU.

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

    def adopt(self, mapping: Mapping, kept: object) -> None:
        """Notes a mapping that another process made, and what to keep while it exists."""
        overlapping = [one for one in self.mappings if one.range.overlaps(mapping.range)]
        if overlapping:
            raise ValueError(f"{mapping.range} overlaps {overlapping[0].range}")
        self._keep(mapping, kept)

    @contextmanager
    def _doubting(self, kept: object) -> Iterator[None]:
        """Keeps what may be mapped, where an exception came between the deed and the word of it."""
        try:
            yield
        except (LuoError, TypeError, ValueError):
            raise  # nothing was done
        except BaseException:
            self._doubtful.append(kept)
            raise

    def _unmap(self, where: IovaRange, subject: str) -> int:
        # Of 2^64 addresses there is no length; one less stands for them.
        length = min(where.length, _EVERYTHING)
        reply = _UNMAP.attempt(
            self._iommufd.fileno(), ioas_id=self.id, iova=where.start, length=length
        )
        for mapping in self.mappings:
            # A request that fails may have unmapped some, and does not say which.
            if mapping.range in where and not (reply.errno and self.maps(mapping.range)):
                del self._mapped[mapping.iova]
        if reply.errno:
            raise from_errno(reply.errno, _UNMAP.name, subject)
        return reply.integer("length")

    def _keep(self, mapping: Mapping, kept: object) -> Mapping:
        self._mapped[mapping.iova] = mapping, kept
        return mapping


def _fixed(iova: int | None) -> int:
    return 0 if iova is None else _FIXED_IOVA


def _at(iova: int | None) -> str:
    return "" if iova is None else f" at {iova:#x}"
