"""`IoasLayout`: the mappings of an IOAS, in a form that is still valid in the next kernel.

A layout refers to files by their names in a store; descriptors and ids change at the jump. One name
may stand for a `GuestRam` of several memfds, and offsets then count through all of them.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from pyluo.errors import IoasLayoutError, RequestError
from pyluo.guest_ram import GuestRam
from pyluo.iommufd import Access, HwptFlags, Ioas, IovaRange, Mapping, PagingHwpt
from pyluo.stores.files_in_use import FileId, file_id
from pyluo.stores.incoming import IncomingStore
from pyluo.stores.outgoing import OutgoingStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Mapping as AnyMapping

    from pyluo.descriptor import HasFileno
    from pyluo.iommufd import IommuFd, IommuObject
    from pyluo.stores.store import Store
    from pyluo.vfio import VfioDevice

    Files = AnyMapping[str, HasFileno | GuestRam] | IncomingStore

__all__ = ["IoasLayout", "NamedMapping", "Rebuilt"]

_VERSION = 1
_KEY = "ioas"
_LETTERS = {Access.READ: "r", Access.WRITE: "w", Access.READ | Access.WRITE: "rw"}
_NO_FLAGS = HwptFlags(0)


@dataclass(frozen=True, slots=True)
class NamedMapping:
    """A mapping that refers to its file by a name.

    Attributes:
        iova: the first IOVA of the mapping.
        length: the length in bytes.
        access: whether devices may read and write the memory.
        name: the name of the file in the store, or its key in `files` (see `IoasLayout.record`).
        offset: the offset in the file, or in the `GuestRam`, at which the mapping begins, in bytes.
    """

    iova: int
    length: int
    access: Access
    name: str
    offset: int

    @property
    def range(self) -> IovaRange:
        """The range of IOVAs of the mapping; its last IOVA is a part of it."""
        return IovaRange(self.iova, self.iova + self.length - 1)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The objects that `IoasLayout.rebuild` created and replaced.

    Attributes:
        ioas: the new IOAS, with all mappings of the layout.
        hwpts: the page tables that the devices are attached to now.
        replaced: the objects that the devices were attached to before; the caller may destroy them.
    """

    ioas: Ioas
    hwpts: tuple[PagingHwpt, ...]
    replaced: tuple[IommuObject, ...]


@dataclass(frozen=True, slots=True)
class IoasLayout:
    """The mappings of an IOAS, each with the name of the mapped file.

    Before the jump, `record` a layout and `save` it in the metadata of a store. After the jump,
    `load` the layout and `rebuild` an IOAS with the same mappings. A layout does not contain the
    ids of iommufd objects, because the next kernel assigns other ids.

    Attributes:
        mappings: the mappings, sorted by IOVA, without overlap.
        allowed: the ranges that must stay mappable; see `Ioas.allow_iovas`.

    Raises:
        IoasLayoutError: mappings overlap or are not sorted; or a mapping or an allowed range is
            empty or reaches beyond 64 bits (EINVAL).
    """

    mappings: tuple[NamedMapping, ...]
    allowed: tuple[IovaRange, ...] = ()

    def __post_init__(self) -> None:
        for mapping in self.mappings:
            if mapping.length <= 0 or mapping.offset < 0 or mapping.access not in _LETTERS:
                hint = "Its length, its offset or its access is not valid"
                raise _error(errno.EINVAL, "create", f"{mapping}", hint)
            if mapping.iova < 0 or mapping.iova + mapping.length > 1 << 64:
                raise _error(errno.EINVAL, "create", f"{mapping}", "It exceeds 64 bits")
        for allowed in self.allowed:
            if allowed.start == allowed.last:
                hint = "The kernel takes no range of one byte"
                raise _error(errno.EINVAL, "create", f"allowed {allowed}", hint)
        for one, other in pairwise(self.mappings):
            if other.iova < one.iova + one.length:
                subject = f"{one.range} and {other.range}"
                raise _error(errno.EINVAL, "create", subject, "They overlap, or are not sorted")

    @classmethod
    def record(
        cls, ioas: Ioas, files: AnyMapping[str, HasFileno | GuestRam] | OutgoingStore
    ) -> Self:
        """Return the present layout of an IOAS.

        Args:
            ioas: the IOAS. This process must know its mappings: it must have created or adopted the
                IOAS.
            files: the store that has the files, or for each name a descriptor or a `GuestRam`.
                Files that are not mapped are ignored.

        Raises:
            IoasLayoutError: memory is mapped by its address in this process, so that no other
                process or kernel can repeat the mapping (EINVAL); a mapped file is not in `files`
                (ENOENT).
        """
        mappings = ioas.mappings
        if isinstance(files, OutgoingStore):
            names = files.find_by_file({one.file for one in mappings if one.file is not None})
        else:
            names = _find_names(files)
        return cls(tuple(_to_named(ioas, mapping, names) for mapping in mappings), ioas.allowed)

    def save(self, store: OutgoingStore, key: str = _KEY) -> None:
        """Add the layout to the metadata of a store.

        Args:
            store: the store.
            key: the key in the metadata; each layout in a store needs a different key.

        Raises:
            IommuError: see `OutgoingStore.update_meta`.
        """
        store.update_meta(key, self.as_json())

    @classmethod
    def load(cls, store: Store, key: str = _KEY) -> Self:
        """Load the layout that `save` added to the metadata of a store.

        Raises:
            IoasLayoutError: the metadata has no such key (ENOENT); see also `from_json`.
        """
        if key not in store.meta:
            subject = f"store {store.name!r}, key {key!r}"
            raise _error(errno.ENOENT, "load", subject, f"Its keys are {sorted(store.meta)}")
        return cls.from_json(store.meta[key])

    def as_json(self) -> dict[str, Any]:
        """Return the layout as a value for JSON.

        Numbers are hexadecimal strings, because not every JSON reader supports 64-bit integers.
        """
        return {
            "version": _VERSION,
            "allowed": [[hex(one.start), hex(one.last)] for one in self.allowed],
            "mappings": [
                {
                    "iova": hex(mapping.iova),
                    "length": hex(mapping.length),
                    "access": _LETTERS[mapping.access],
                    "file": mapping.name,
                    "offset": hex(mapping.offset),
                }
                for mapping in self.mappings
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the layout for a value that `as_json` returned.

        Raises:
            IoasLayoutError: the value is from a newer pyluo (EPROTONOSUPPORT), or is damaged
                (EBADMSG or EINVAL).
        """
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise _error(errno.EBADMSG, "from_json", "layout", "It has no version")
        if data["version"] != _VERSION:
            subject = f"layout of version {data['version']}"
            hint = f"This pyluo reads version {_VERSION}: a newer one is needed"
            raise _error(errno.EPROTONOSUPPORT, "from_json", subject, hint)
        accesses = {letters: access for access, letters in _LETTERS.items()}
        try:
            return cls(
                tuple(
                    NamedMapping(
                        iova=int(one["iova"], 16),
                        length=int(one["length"], 16),
                        access=accesses[one["access"]],
                        name=_check_text(one["file"]),
                        offset=int(one["offset"], 16),
                    )
                    for one in data["mappings"]
                ),
                tuple(IovaRange(int(start, 16), int(last, 16)) for start, last in data["allowed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _error(errno.EBADMSG, "from_json", "layout", f"Damaged: {error!r}") from error

    def rebuild(
        self,
        iommufd: IommuFd,
        files: Files,
        devices: Sequence[VfioDevice] = (),
        *,
        flags: HwptFlags = _NO_FLAGS,
    ) -> Rebuilt:
        """Create an IOAS with this layout, and attach devices to page tables of that IOAS.

        Before anything is mapped, `rebuild` checks that each file exists and is long enough, and
        that each mapping is at addresses that the IOMMUs of the devices support and do not reserve.
        The devices are attached after everything is mapped. A device that is already attached moves
        in one step, so its DMA always uses either the old page table or the complete new one. If
        anything fails, the devices are attached as before and the new objects are destroyed.

        PASID attachments and `Ioas.huge_pages` are not part of a layout, so `rebuild` does not
        restore them.

        Args:
            iommufd: the iommufd that the devices are bound to.
            files: a store, or for each name a descriptor or a `GuestRam`. A
                mapping that crosses from one memfd to the next becomes one mapping for each.
            devices: the devices. Each must be bound to `iommufd`; it may be attached already or
                not.
            flags: the flags for new page tables.

        Raises:
            ValueError: a device is bound to another iommufd.
            IoasLayoutError: a file is missing (ENOENT) or too short (EFBIG), or the hardware cannot
                map an address (EADDRINUSE). The message lists all problems; the errno is the first
                of the three that applies.
            IommuError: see `IommuDevice.alloc_hwpt`, `Ioas.map_file` and `VfioDevice.attach`.
        """
        for device in devices:
            device.iommu_device.id_in(iommufd)
        ioas = iommufd.alloc_ioas()
        hwpts: list[PagingHwpt] = []
        moved: list[tuple[VfioDevice, IommuObject | None]] = []
        try:
            if self.allowed:
                ioas.allow_iovas(self.allowed)
            # Allocate the page tables now: this limits the IOAS to addresses that the IOMMUs can
            # reach, as `check` needs, before any device is attached.
            by_iommu: dict[str, PagingHwpt] = {}
            for device in devices:
                if device.iommu not in by_iommu:
                    hwpt = device.iommu_device.alloc_hwpt(ioas, flags=flags)
                    by_iommu[device.iommu] = hwpt
                    hwpts.append(hwpt)
            self.check(ioas, files, devices)
            self._map(ioas, files)
            # Begin with devices that are attached: all attached devices of an IOMMU group move
            # together with the first of them.
            for device in sorted(devices, key=lambda device: device.attached is None):
                if device.attached in hwpts:
                    continue  # the device has moved together with its group
                # Note the move before making it, because a signal handler may raise afterwards.
                moved.append((device, device.attached))
                shared = by_iommu[device.iommu]
                is_in_use = any(other.attached is shared for other in devices)
                _attach(device, ioas, flags, shared, hwpts, is_in_use)
        except BaseException as error:
            _undo(error, ioas, hwpts, moved)
            raise
        replaced = dict.fromkeys(before for _, before in moved if before is not None)
        return Rebuilt(ioas, tuple(hwpts), tuple(replaced))

    def check(
        self,
        ioas: Ioas,
        files: Files,
        devices: Sequence[VfioDevice] = (),
    ) -> None:
        """Check that an IOAS can have all mappings, and that their files exist and are long enough.

        Args:
            ioas: an IOAS that has a page table or a device, and so is limited to the addresses that
                the hardware can reach.
            files: a store, or for each name a descriptor or a `GuestRam`.
            devices: the devices that will be attached; their reserved addresses cannot be mapped.

        Raises:
            IoasLayoutError: see `rebuild`.
        """
        misfits = {
            errno.ENOENT: _find_missing(self.mappings, files),
            errno.EFBIG: _find_too_short(self.mappings, files),
            errno.EADDRINUSE: _find_out_of_reach(self.mappings, ioas, devices),
        }
        found = [misfit for group in misfits.values() for misfit in group]
        if found:
            number = next(number for number, group in misfits.items() if group)
            raise _misfit_error(number, found)

    def adopt(self, iommufd: IommuFd, object_id: int, files: Files) -> Ioas:
        """Return an `Ioas` for an existing IOAS that another process created.

        This layout must describe that IOAS. Nothing is mapped: the layout only tells this process
        which mappings exist.

        Args:
            iommufd: the iommufd that was received from the other process.
            object_id: the `id` of the IOAS in the other process.
            files: a store, or for each name a descriptor or a `GuestRam`.

        Raises:
            IoasLayoutError: a file is missing, or a mapping of the layout is not in the IOAS
                (ENOENT).
            IommuError: the iommufd has no IOAS of this id (ENOENT).
        """
        if misfits := _find_missing(self.mappings, files):
            raise _misfit_error(errno.ENOENT, misfits)
        ioas = Ioas(iommufd, object_id)
        try:
            ioas.iova_ranges()  # raises IommuError if the iommufd has no IOAS of this id
            if unmapped := _find_unmapped(self.mappings, ioas):
                raise _misfit_error(
                    errno.ENOENT, [f"{where} of {ioas} is not mapped" for where in unmapped]
                )
            with ExitStack() as stack:
                named = _NamedFiles(files, stack)
                ioas.adopt(
                    _to_mapping(piece, part)
                    for mapping in self.mappings
                    for part, piece in _split(mapping, named.parts(mapping.name))
                )
            ioas.allowed = self.allowed
        except BaseException:
            ioas.forget()
            raise
        return ioas

    def _map(self, ioas: Ioas, files: Files) -> None:
        with ExitStack() as stack:
            named = _NamedFiles(files, stack)
            for mapping in self.mappings:
                for part, piece in _split(mapping, named.parts(mapping.name)):
                    ioas.map_file(
                        part.file,
                        offset=piece.offset,
                        length=piece.length,
                        iova=piece.iova,
                        access=piece.access,
                    )


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the consecutive files that a name stands for.

    Attributes:
        file: the file.
        id: its device and inode.
        start: the bytes of the files before it.
        size: its size in bytes.
    """

    file: HasFileno
    id: FileId
    start: int
    size: int


class _NamedFiles:
    """The files of the names in a layout, each opened and looked at once.

    Args:
        files: the files.
        stack: closes the files from a store, as a mapping stays valid without a descriptor.
    """

    def __init__(self, files: Files, stack: ExitStack) -> None:
        self._files = files
        self._stack = stack
        self._parts: dict[str, list[_Part]] = {}

    def parts(self, name: str) -> list[_Part]:
        """Return the file of a name, or the memfds of the RAM of that name in their order."""
        if name not in self._parts:
            start = 0
            parts = []
            for file in self._stack.enter_context(_open_named(self._files, name)):
                status = os.fstat(file.fileno())
                parts.append(_Part(file, (status.st_dev, status.st_ino), start, status.st_size))
                start += status.st_size
            self._parts[name] = parts
        return self._parts[name]


@contextmanager
def _open_named(files: Files, name: str) -> Iterator[Sequence[HasFileno]]:
    """Yield the file of this name, or the memfds of the RAM of this name in their order.

    Files from a store are closed afterwards, as a mapping stays valid without a descriptor.
    """
    if isinstance(files, IncomingStore):
        with files.borrow(name) as borrowed:
            yield borrowed
        return
    named = files[name]
    yield named.memfds if isinstance(named, GuestRam) else [named]


def _find_names(
    files: AnyMapping[str, HasFileno | GuestRam],
) -> dict[FileId, tuple[str, int]]:
    """Return for each file its name, and where it begins in the RAM of that name, in bytes."""
    names: dict[FileId, tuple[str, int]] = {}
    for name in files:
        with _open_named(files, name) as parts:
            start = 0
            for part in parts:
                names.setdefault(file_id(part.fileno()), (name, start))
                start += os.fstat(part.fileno()).st_size
    return names


def _split(mapping: NamedMapping, parts: Sequence[_Part]) -> Iterator[tuple[_Part, NamedMapping]]:
    """Split a mapping of consecutive files into one for each file, with its offset in that file.

    What is beyond the end of the last file stays in the mapping of that file.
    """
    end = mapping.offset + mapping.length
    for part in parts:
        first = max(mapping.offset, part.start)
        after = end if part is parts[-1] else min(end, part.start + part.size)
        if part.start == 0 and (first, after) == (mapping.offset, end):
            yield part, mapping
        elif first < after:
            iova = mapping.iova + first - mapping.offset
            offset = first - part.start
            yield part, replace(mapping, iova=iova, length=after - first, offset=offset)


def _to_named(
    ioas: Ioas, mapping: Mapping, names: AnyMapping[tuple[int, int], tuple[str, int]]
) -> NamedMapping:
    subject = f"{ioas}: {mapping.range}"
    if mapping.file is None:
        hint = "It is mapped by its address in this process: map a file with `Ioas.map_file`"
        raise _error(errno.EINVAL, "record", subject, hint)
    if mapping.file not in names:
        known = sorted({name for name, _ in names.values()})
        hint = f"The file that is mapped there is none of {known}"
        raise _error(errno.ENOENT, "record", subject, hint)
    name, start = names[mapping.file]
    return NamedMapping(mapping.iova, mapping.length, mapping.access, name, start + mapping.offset)


def _to_mapping(mapping: NamedMapping, part: _Part) -> Mapping:
    return Mapping(mapping.iova, mapping.length, mapping.access, part.id, mapping.offset)


def _find_unmapped(mappings: Sequence[NamedMapping], ioas: Ioas) -> list[IovaRange]:
    """Return the ranges of mappings that an IOAS does not have.

    While nobody drives the devices, each question to the kernel counts: there is one for each run
    of adjacent mappings, and only in a run with a hole one for each mapping.
    """
    runs: list[list[IovaRange]] = []
    for where in (mapping.range for mapping in mappings):
        if runs and runs[-1][-1].last + 1 == where.start:
            runs[-1].append(where)
        else:
            runs.append([where])
    return [
        where
        for run in runs
        if not ioas.maps(IovaRange(run[0].start, run[-1].last))
        for where in run
        if not ioas.maps(where)
    ]


def _find_missing(mappings: Sequence[NamedMapping], files: Files) -> list[str]:
    return [
        f"{mapping.range} needs {mapping.name!r}, which is missing"
        for mapping in mappings
        if mapping.name not in files
    ]


def _find_too_short(mappings: Sequence[NamedMapping], files: Files) -> list[str]:
    sizes = {}
    for name in dict.fromkeys(mapping.name for mapping in mappings if mapping.name in files):
        with _open_named(files, name) as parts:
            sizes[name] = sum(os.fstat(part.fileno()).st_size for part in parts)
    return [
        f"{mapping.range} needs {mapping.offset + mapping.length} bytes of {mapping.name!r}, which "
        f"has {sizes[mapping.name]}"
        for mapping in mappings
        if mapping.name in sizes and mapping.offset + mapping.length > sizes[mapping.name]
    ]


def _find_out_of_reach(
    mappings: Sequence[NamedMapping], ioas: Ioas, devices: Sequence[VfioDevice]
) -> list[str]:
    found = ioas.iova_ranges()
    reserved = [(device, device.reserved_iovas()) for device in devices]
    misfits = []
    for mapping in mappings:
        if not found.allow(mapping.range):
            misfits.append(f"{mapping.range} is outside {', '.join(map(str, found.ranges))}")
        if (mapping.iova | mapping.length | mapping.offset) % found.alignment:
            misfits.append(f"{mapping.range} is not aligned to {found.alignment} bytes")
        misfits += [
            f"{mapping.range} overlaps {one}, reserved for {device}"
            for device, ranges in reserved
            for one in ranges
            if mapping.range.overlaps(one)
        ]
    return misfits


def _attach(
    device: VfioDevice,
    ioas: Ioas,
    flags: HwptFlags,
    shared: PagingHwpt,
    hwpts: list[PagingHwpt],
    is_in_use: bool,
) -> None:
    """Attach a device to the page table of its IOMMU.

    If the kernel refuses because the page table does not suit this device, although it suits
    another device of the same IOMMU (`is_in_use`), the device gets a page table of its own.
    """
    try:
        device.attach(shared)
    except RequestError as error:
        if error.errno != errno.EINVAL or not is_in_use:
            raise
        new_hwpt = device.iommu_device.alloc_hwpt(ioas, flags=flags)
        hwpts.append(new_hwpt)
        device.attach(new_hwpt)


def _undo(
    error: BaseException,
    ioas: Ioas,
    hwpts: Sequence[PagingHwpt],
    moved: Sequence[tuple[VfioDevice, IommuObject | None]],
) -> None:
    """Attach the devices to their old page tables, or detach them, and destroy the new objects.

    Failures of these steps are added to `error` as notes.
    """
    for device, before in reversed(moved):
        try:
            if before is None:
                device.detach_pt()
            else:
                device.attach(before)
        except (RequestError, ValueError) as failed:
            error.add_note(f"{device} could not be attached to its old page table: {failed}")
    for made in (*hwpts, ioas):
        try:
            made.destroy()
        except RequestError as failed:
            error.add_note(f"{made} could not be destroyed: {failed}")


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _misfit_error(number: int, misfits: Sequence[str]) -> IoasLayoutError:
    return _error(number, "check", "layout", "; ".join(misfits) + ". Nothing was mapped")


def _error(number: int, operation: str, subject: str, hint: str) -> IoasLayoutError:
    return IoasLayoutError(number, f"IoasLayout.{operation}", subject, hint)
