"""`GuestRam`: the memory of a guest, as one or more memfds that a live update can carry over."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self

from pyluo._sys import MMAP, Exported, bind_to_nodes, constant, madvise, map_over
from pyluo.descriptor import OwnedFd
from pyluo.errors import LuoError, RequestError
from pyluo.guards import SIZE_LIMIT
from pyluo.memfd import Memfd
from pyluo.numa import NumaPolicy
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from pyluo.memfd import Seal

__all__ = ["GuestRam", "RamMapping", "RamPiece"]

_VERSION = 1
_PAGE = mmap.PAGESIZE
# A power of two, so that each part begins at a multiple of every huge page size.
_PART_SIZE = SIZE_LIMIT // 2
# Between two such steps, populating memory lets Python's signal handlers run.
_POPULATE_STEP = 1 << 30
_NORESERVE = constant("MAP_NORESERVE")
_LOCK = Operation(
    "lock a guest's RAM", refusals={errno.EWOULDBLOCK: "Another process runs a VM with it"}
)


@dataclass(frozen=True, slots=True)
class RamPiece:
    """A range of a guest's RAM that lies within one memfd.

    Attributes:
        memfd: the memfd, which belongs to the `GuestRam`.
        offset: the offset in the memfd in bytes.
        length: the length in bytes.
    """

    memfd: Memfd
    offset: int
    length: int


class RamMapping(mmap.mmap):
    """All of a guest's RAM, mapped in one piece into this process.

    It is an `mmap.mmap`, and so a buffer: take a `memoryview` of it to pass on a part, or give it
    to `Ioas.map`. It stays valid after the `GuestRam` is closed. It cannot be closed while a buffer
    exported from it exists (BufferError). If it is dropped, the memory is unmapped when the last
    such buffer is gone.

    Create it with `GuestRam.map`.
    """

    # mmap.mmap knows its address and its length. It counts the buffers that are exported, and
    # unmaps everything between the two ends, so the mappings of the parts, which replace what it
    # mapped at first, need no other owner.
    __slots__ = ()

    @property
    def address(self) -> int:
        """The address of the first byte in this process, until the mapping is closed.

        Raises:
            ValueError: the mapping is closed.
        """
        with self._exported() as memory:
            return memory.address

    def size(self) -> int:
        """Return the length of the mapping in bytes, as `len` does."""
        return len(self)

    def resize(self, newsize: int) -> None:
        """Raise TypeError: the RAM of a guest cannot be resized."""
        raise TypeError(f"a mapping of a guest's RAM cannot be resized to {newsize} bytes")

    def populate(self, offset: int = 0, length: int | None = None) -> None:
        """Allocate all pages of a range, and map them, so that no access to them has to wait.

        Other threads run meanwhile. They can populate other ranges at the same time.

        Args:
            offset: the offset of the range in bytes; a multiple of the page size.
            length: the length of the range in bytes; by default the range reaches to the end.

        Raises:
            ValueError: the range does not lie within the mapping, or the mapping is closed.
            RequestError: there is not enough memory, or there are too few huge pages (ENOMEM or
                EFAULT); the kernel is too old (EINVAL).

        Source: madvise(2), MADV_POPULATE_WRITE; MADV_POPULATE_READ if the mapping is read-only.
        Linux 5.14.
        """
        length = len(self) - offset if length is None else length
        with memoryview(self) as view:
            advice = "MADV_POPULATE_READ" if view.readonly else "MADV_POPULATE_WRITE"
        with self._exported() as memory:
            memory.address_of_range(offset, length)
            for start in range(offset, offset + length, _POPULATE_STEP):
                step = min(_POPULATE_STEP, offset + length - start)
                madvise(memory, start, step, advice, f"{step} bytes of a guest's RAM at {start}")

    @contextmanager
    def _exported(self) -> Iterator[Exported]:
        memory = Exported(self, writable=False)
        try:
            yield memory
        finally:
            memory.release()


class GuestRam:
    """The RAM of a guest: one range of bytes in one or more memfds, which it owns.

    Kernels up to 7.3 cannot preserve a memfd of a tebibyte or more, so that a larger RAM consists
    of several. Preserve each of `memfds`, keep `as_json` with them, and return to the same RAM
    after the jump with `from_memfds`.

    Several threads may read, write and map the RAM at the same time. The caller must not close the
    object while another thread uses it, and must not resize the memfds.

    Attributes:
        size: the size in bytes.
        numa: the NUMA policies, in the order in which they are applied.
        transparent_huge_pages: whether mappings ask for transparent huge pages.
    """

    __slots__ = (
        "__weakref__",
        "_bounds",
        "_memfds",
        "_page_size",
        "numa",
        "size",
        "transparent_huge_pages",
    )

    def __init__(
        self,
        memfds: Sequence[Memfd],
        *,
        numa: Iterable[NumaPolicy] = (),
        transparent_huge_pages: bool = False,
    ) -> None:
        sizes = [memfd.size for memfd in memfds]
        page_sizes = {os.fstatvfs(memfd.fileno()).f_bsize for memfd in memfds}
        if len(page_sizes) != 1:
            raise ValueError(f"{len(sizes)} memfds with pages of {sorted(page_sizes)} bytes")
        self._page_size = page_sizes.pop()
        for size in sizes:
            _check_size("a memfd", size, self._page_size)
            _check_limit(size)
        stats = [os.fstat(memfd.fileno()) for memfd in memfds]
        if len({(stat.st_dev, stat.st_ino) for stat in stats}) < len(stats):
            raise ValueError("the same memfd is there twice")
        self._bounds = [0, *accumulate(sizes)]
        self.size: int = self._bounds[-1]
        self._set_policies(numa)
        self.transparent_huge_pages: bool = transparent_huge_pages
        self._memfds = tuple(memfds)

    @classmethod
    def create(
        cls,
        name: str,
        size: int,
        *,
        part_size: int = _PART_SIZE,
        seals: Seal | None = None,
        huge_page_size: int = 0,
        transparent_huge_pages: bool = False,
        numa: NumaPolicy | Iterable[NumaPolicy] = (),
        populate: bool = False,
        executable: bool = True,
    ) -> Self:
        """Create memfds for a guest's RAM of `size` zero bytes, with close-on-exec set.

        Args:
            name: the name shown in /proc/PID/fd, followed by a dot and the number of the memfd; at
                most 240 bytes. A live update does not carry the name over.
            size: the size in bytes; a multiple of the page size, or of `huge_page_size`.
            part_size: the size of each memfd in bytes, except the last one, which may be smaller; a
                multiple of the page size or of `huge_page_size`, and less than 1 TiB.
            seals: seals to add to each memfd at the end.
            huge_page_size: the size of the huge pages in bytes, as for `Memfd.create`. Kernels up
                to 7.3 do not preserve such memfds.
            transparent_huge_pages: whether each mapping asks for transparent huge pages. They are
                allocated only if /sys/kernel/mm/transparent_hugepage/shmem_enabled is not `never`,
                and only for pages that are first accessed, or populated, through such a mapping.
            numa: the NUMA policy, or one policy for each range; a later one replaces an earlier
                one. It is a property of the file, which also holds for pages that the kernel or
                another process allocates. With `huge_page_size` it is a property of each mapping
                that `map` returns.
            populate: whether to allocate all pages now, which may take long.
            executable: see `Memfd.create`. False is for a RAM that no live update is to carry over.

        Raises:
            ValueError: a size is not positive, not a multiple of the page size or too large; a
                policy's range does not lie within the RAM; both kinds of huge pages are asked for.
            RequestError: see `Memfd.create` and `map`.

        Source: memfd_create(2), mbind(2). Linux 3.17; `populate` needs Linux 5.14.
        """
        page_size = huge_page_size or _PAGE
        _check_size("a guest's RAM", size, page_size)
        _check_size("a part", part_size, page_size)
        _check_limit(part_size)
        if huge_page_size and transparent_huge_pages:
            raise ValueError("huge pages of a fixed size are never transparent")
        with ExitStack() as undo:
            memfds = [
                undo.enter_context(
                    Memfd.create(
                        f"{name}.{number}",
                        min(part_size, size - start),
                        huge_page_size=huge_page_size,
                        executable=executable,
                    )
                )
                for number, start in enumerate(range(0, size, part_size))
            ]
            ram = cls(
                memfds,
                numa=[numa] if isinstance(numa, NumaPolicy) else numa,
                transparent_huge_pages=transparent_huge_pages,
            )
            if ram.numa or populate:
                ram.map(populate=populate).close()
            if seals:
                for memfd in memfds:
                    memfd.seal(seals)
            undo.pop_all()
        return ram

    @classmethod
    def from_memfds(cls, memfds: Sequence[Memfd], description: Any = None) -> Self:
        """Return a RAM that owns these memfds, for example those that a live update carried over.

        A live update carries over neither NUMA policies nor advice about huge pages. The policies
        of the description are set again, but they move no page: each page is where it was before
        the jump, and only pages that are allocated later obey the policies.

        Args:
            memfds: the memfds, in the order of their parts.
            description: what `as_json` returned before the jump; None if there is nothing to check
                and nothing to set.

        Raises:
            ValueError: there is no memfd, one is there twice, one is empty, not a multiple of its
                page size or too large, or they differ in their page size. The caller still owns the
                memfds.
            LuoError: the description is from a newer pyluo (EPROTONOSUPPORT), is damaged, or is of
                memfds of other sizes (EBADMSG); this kernel does not accept a policy: see `map`.
                The caller still owns the memfds, and can leave out the description.
        """
        ram = cls(memfds)
        if description is None:
            return ram
        sizes, numa, ram.transparent_huge_pages = _read_description(description)
        found = [piece.length for piece in ram.pieces()]
        if found != sizes:
            raise _error(errno.EBADMSG, f"The description is of {sizes} bytes, not of {found}")
        try:
            ram._set_policies(numa)
        except ValueError as error:
            raise _error(errno.EBADMSG, f"Damaged: {error}") from error
        if numa:
            ram.map(writable=False).close()
        return ram

    def as_json(self) -> dict[str, Any]:
        """Return what `from_memfds` needs besides the memfds, as a value for JSON.

        Numbers of bytes are hexadecimal strings, because not every JSON reader supports 64-bit
        integers.
        """
        return {
            "version": _VERSION,
            "sizes": [hex(piece.length) for piece in self.pieces()],
            "numa": [policy.as_json() for policy in self.numa],
            "transparent_huge_pages": self.transparent_huge_pages,
        }

    @property
    def memfds(self) -> tuple[Memfd, ...]:
        """The memfds, in the order of their parts.

        Raises:
            ValueError: the RAM is closed.
        """
        if not self._memfds:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._memfds

    @property
    def offsets(self) -> tuple[int, ...]:
        """The offset in the RAM, in bytes, at which each memfd begins."""
        return tuple(self._bounds[:-1])

    def locate(self, offset: int) -> tuple[Memfd, int]:
        """Return the memfd that has the byte at an offset, and the offset in that memfd.

        Raises:
            ValueError: the offset does not lie within the RAM, or the RAM is closed.
        """
        [piece] = self.pieces(offset, 1)
        return piece.memfd, piece.offset

    def pieces(self, offset: int = 0, length: int | None = None) -> tuple[RamPiece, ...]:
        """Return a range of the RAM, split where one memfd ends and the next begins.

        Args:
            offset: the offset of the range in bytes.
            length: the length in bytes; by default the range reaches to the end of the RAM.

        Raises:
            ValueError: the range does not lie within the RAM, or the RAM is closed.
        """
        memfds = self.memfds
        length = self.size - offset if length is None else length
        end = offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise ValueError(f"{length} bytes at {offset} do not lie within {self.size} bytes")
        pieces = []
        while offset < end:
            part = bisect_right(self._bounds, offset) - 1
            step = min(end, self._bounds[part + 1]) - offset
            pieces.append(RamPiece(memfds[part], offset - self._bounds[part], step))
            offset += step
        return tuple(pieces)

    def read(self, length: int, offset: int) -> bytes:
        """Return `length` bytes from `offset`, or fewer if the RAM ends before.

        Raises:
            ValueError: the length or the offset is negative.
        """
        if length < 0 or offset < 0:
            raise ValueError(f"{length} bytes at {offset}: neither can be negative")
        start = min(offset, self.size)
        return b"".join(
            piece.memfd.read(piece.length, piece.offset)
            for piece in self.pieces(start, min(length, self.size - start))
        )

    def write(self, data: bytes | bytearray | memoryview | mmap.mmap, offset: int) -> None:
        """Write all of `data` at `offset`; nothing is written if it does not fit.

        Raises:
            ValueError: the range does not lie within the RAM.
            RequestError: see `Memfd.write`. The bytes already written stay in the RAM.
        """
        view = memoryview(data).cast("B")
        for piece in self.pieces(offset, len(view)):
            piece.memfd.write(view[: piece.length], piece.offset)
            view = view[piece.length :]

    def map(self, *, writable: bool = True, populate: bool = False) -> RamMapping:
        """Map all memfds one behind the other into this process.

        After mlockall(2) with MCL_FUTURE but without MCL_ONFAULT, the kernel populates each mapping
        when it is made, so this call then needs twice the memory for a moment.

        Args:
            writable: whether the mapping can be written to.
            populate: whether to allocate and map all pages now; see `RamMapping.populate`.

        Raises:
            SealedError: the mapping is to be writable, and a seal forbids it (EPERM).
            RequestError: the process cannot have so much address space, or too few huge pages are
                reserved (ENOMEM); a policy names a node that does not exist or that this process
                may not use (EINVAL); the kernel has no NUMA policies (ENOSYS) or no transparent
                huge pages (EINVAL); see also `RamMapping.populate`.
            ValueError: the RAM is closed.

        Source: mmap(2), MAP_FIXED; mbind(2); madvise(2), MADV_HUGEPAGE. Linux 3.17.
        """
        pieces = self.pieces()
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        subject = f"{self!r}: {self.size} bytes"
        # Reserve the address range with a mapping of an empty file of the same kind of pages, which
        # makes the kernel align the range to them. Unlike private memory, such a mapping does not
        # count as committed memory (vm.overcommit_memory=2). No page of it is ever touched.
        with (
            Memfd.create(
                "reserved", self.size, huge_page_size=self._huge_page_size(), executable=False
            ) as reserved,
            MMAP.raising(subject),
        ):
            mapping = RamMapping(
                reserved.fileno(), self.size, flags=mmap.MAP_SHARED | _NORESERVE, prot=protection
            )
        try:
            with mapping._exported() as memory:
                for start, piece in zip(self.offsets, pieces, strict=True):
                    fd = piece.memfd.fileno()
                    map_over(memory, start, piece.length, fd, protection, mmap.MAP_SHARED, subject)
                if self.transparent_huge_pages:
                    madvise(memory, 0, self.size, "MADV_HUGEPAGE", subject)
                for policy in self.numa:
                    length = self.size - policy.offset if policy.length is None else policy.length
                    nodes = f"{self!r}: {policy}"
                    bind_to_nodes(memory, policy.offset, length, policy.mode, policy.nodes, nodes)
            if populate:
                mapping.populate()
        except BaseException:
            mapping.close()
            raise
        return mapping

    def lock(self) -> OwnedFd:
        """Take the lock on this RAM, so that no other process runs a VM with it.

        A jump gives up the lock, as the end of its holder does.

        Returns:
            The descriptor that has the lock, until it is closed in all processes that have it: give
            it to a process that is started to run the VM.

        Raises:
            RequestError: another process has the lock (EWOULDBLOCK).

        Source: flock(2).
        """
        # The file is opened anew, because all descriptors that a session returns share one open
        # file, and a lock belongs to the open file.
        path = f"/proc/self/fd/{self.memfds[0].fileno()}"
        with _LOCK.raising(f"the RAM {self!r}"):
            file = OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                file.close()
                raise
        return file

    @property
    def closed(self) -> bool:
        """Whether the RAM was closed or detached."""
        return not self._memfds

    def close(self) -> None:
        """Close the memfds; closing them twice does nothing. Mappings stay valid."""
        memfds, self._memfds = self._memfds, ()
        for memfd in memfds:
            memfd.close()

    def detach(self) -> tuple[Memfd, ...]:
        """Return the memfds without closing them; the caller owns them from now on."""
        memfds = self.memfds
        self._memfds = ()
        return memfds

    def __enter__(self) -> Self:
        assert self.memfds
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"size={self.size} memfds={len(self._memfds)}"
        return f"<{type(self).__name__} {state}>"

    def _huge_page_size(self) -> int:
        return 0 if self._page_size == _PAGE else self._page_size

    def _set_policies(self, policies: Iterable[NumaPolicy]) -> None:
        self.numa: tuple[NumaPolicy, ...] = tuple(policies)
        for policy in self.numa:
            length = self.size - policy.offset if policy.length is None else policy.length
            if length <= 0 or policy.offset + length > self.size:
                raise ValueError(f"{policy} does not lie within {self.size} bytes")
            if policy.offset % self._page_size or length % self._page_size:
                raise ValueError(f"{policy} is not of whole pages of {self._page_size} bytes")


def _check_size(what: str, size: int, page_size: int) -> None:
    if size <= 0 or size % page_size:
        raise ValueError(f"{what} of {size} bytes: it must consist of pages of {page_size} bytes")


def _check_limit(size: int) -> None:
    if size >= SIZE_LIMIT:
        raise ValueError(f"a memfd of {size} bytes could not be preserved: less than 1 TiB can")


def _read_description(data: Any) -> tuple[list[int], tuple[NumaPolicy, ...], bool]:
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise _error(errno.EBADMSG, "It has no version")
    if data["version"] != _VERSION:
        hint = f"It is of version {data['version']}; this pyluo reads version {_VERSION}"
        raise _error(errno.EPROTONOSUPPORT, hint)
    try:
        return (
            [int(size, 16) for size in data["sizes"]],
            tuple(NumaPolicy.from_json(policy) for policy in data["numa"]),
            bool(data["transparent_huge_pages"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _error(errno.EBADMSG, f"Damaged: {error!r}") from error


def _error(number: int, hint: str) -> RequestError:
    return LuoError(number, "GuestRam.from_memfds", "description of a guest's RAM", hint)
