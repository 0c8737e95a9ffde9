"""What is mapped where for devices, in terms that outlive the kernel: names, not descriptors."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from pyluo.errors import IoasLayoutError, LuoError
from pyluo.fdstore import FdStore
from pyluo.iommufd import Access, HwptFlags, Ioas, IovaRange, Mapping, PagingHwpt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Mapping as AnyMapping

    from pyluo.descriptor import HasFileno
    from pyluo.iommufd import IommuFd, IommuObject
    from pyluo.vfio import VfioDevice

__all__ = ["IoasLayout", "NamedMapping", "Rebuilt"]

_VERSION = 1
_KEY = "ioas"
_LETTERS = {Access.READ: "r", Access.WRITE: "w", Access.READ | Access.WRITE: "rw"}
_NO_FLAGS = HwptFlags(0)


@dataclass(frozen=True, slots=True)
class NamedMapping:
    """What is mapped somewhere.

    Attributes:
        iova: the first address of it.
        length: in bytes.
        access: what a device may do with it.
        name: of the file.
        offset: in bytes from the start of the file.
    """

    iova: int
    length: int
    access: Access
    name: str
    offset: int

    @property
    def range(self) -> IovaRange:
        """Where it is."""
        return IovaRange(self.iova, self.iova + self.length - 1)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What `IoasLayout.rebuild` made.

    Attributes:
        ioas: with everything mapped.
        hwpts: the page tables that the devices are attached to now.
        replaced: what the devices were attached to before, if anything, for the caller to destroy.
    """

    ioas: Ioas
    hwpts: tuple[PagingHwpt, ...]
    replaced: tuple[IommuObject, ...]


@dataclass(frozen=True, slots=True)
class IoasLayout:
    """The contents of an IOAS, by the names that its files have in a store.

    Recorded before the jump and kept in the store's metadata; after the jump an IOAS like the old
    one is built from it. Ids are not part of it: the next kernel gives out its own.

    Attributes:
        mappings: in the order of addresses, without overlap.
        allowed: what has to stay possible to map, as set by `Ioas.allow_iovas`.

    Raises:
        IoasLayoutError: EINVAL, mappings overlap or are unsorted; one of them, or an allowed range,
            is empty or reaches beyond 64 bits.
    """

    mappings: tuple[NamedMapping, ...]
    allowed: tuple[IovaRange, ...] = ()

    def __post_init__(self) -> None:
        for mapping in self.mappings:
            if mapping.length <= 0 or mapping.offset < 0 or mapping.access not in _LETTERS:
                raise _error(errno.EINVAL, "create", f"{mapping}", "It makes no sense")
            if mapping.iova < 0 or mapping.range.last >> 64:
                raise _error(errno.EINVAL, "create", f"{mapping}", "It exceeds 64 bits")
        for allowed in self.allowed:
            if not 0 <= allowed.start < allowed.last < 1 << 64:
                raise _error(errno.EINVAL, "create", f"allowed {allowed}", "It is no range")
        for one, other in pairwise(self.mappings):
            if other.iova <= one.range.last:
                subject = f"{one.range} and {other.range}"
                raise _error(errno.EINVAL, "create", subject, "They overlap, or are unsorted")

    @classmethod
    def record(cls, ioas: Ioas, files: AnyMapping[str, HasFileno] | FdStore) -> Self:
        """The layout of an IOAS as it is now.

        Args:
            ioas: of which this process knows all mappings: made by it, or adopted.
            files: the names; files that are not mapped may be among them.

        Raises:
            IoasLayoutError: EINVAL, something is mapped by its address in this process, which no
                other process or kernel can repeat; ENOENT, something is mapped that has no name
                among the files; EINPROGRESS, a signal cut a request short, so that it is not known
                what is mapped: see `Ioas.known`.
        """
        if not ioas.known:
            hint = "A request was cut short by a signal: unmap everything, and map it again"
            raise _error(errno.EINPROGRESS, "record", str(ioas), hint)
        names: dict[tuple[int, int], str] = {}
        for name in files:
            with _open_named(files, name) as file:
                stat = os.fstat(file.fileno())
            names.setdefault((stat.st_dev, stat.st_ino), name)
        return cls(
            tuple(_to_named(ioas, mapping, names) for mapping in ioas.mappings), ioas.allowed
        )

    def save(self, store: FdStore, key: str = _KEY) -> None:
        """Puts the layout into the metadata of a store, beside what is there.

        Args:
            store: outgoing.
            key: of the metadata; of a VM with several IOAS each has its own.

        Raises:
            FdStoreError: as `FdStore.set_meta` does.
        """
        store.set_meta({**store.meta, key: self.as_json()})

    @classmethod
    def load(cls, store: FdStore, key: str = _KEY) -> Self:
        """The layout that `save` put into the metadata of a store.

        Raises:
            IoasLayoutError: ENOENT, there is none under this key; and as `from_json` does.
        """
        if key not in store.meta:
            subject = f"store {store.name!r}, key {key!r}"
            raise _error(errno.ENOENT, "load", subject, f"Its keys are {sorted(store.meta)}")
        return cls.from_json(store.meta[key])

    def as_json(self) -> dict[str, Any]:
        """What JSON can carry; numbers as text, since not every reader has integers of 64 bits."""
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
        """The layout of which `as_json` made this.

        Raises:
            IoasLayoutError: EPROTONOSUPPORT, a newer pyluo made it; EBADMSG or EINVAL, it is
                damaged.
        """
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise _error(errno.EBADMSG, "from_json", "layout", "It has no version: is it one?")
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
        files: AnyMapping[str, HasFileno] | FdStore,
        devices: Sequence[VfioDevice] = (),
        *,
        flags: HwptFlags = _NO_FLAGS,
    ) -> Rebuilt:
        """A new IOAS with this layout, and devices attached to it.

        Everything is checked before the first map: that each file is there and long enough, and
        that the IOMMU of each device, and its reserved addresses, leave room for each mapping.
        Devices are attached when all is mapped. One that is attached to something else is moved in
        one step: its DMA finds either the old page table or the whole new one. If anything fails,
        it all is as it was before. PASIDs, and whether huge pages may be used, are no part of a
        layout.

        Args:
            iommufd: which the devices are bound to.
            files: where the names lead; of a store the files needed are retrieved.
            devices: bound, attached or not.
            flags: what the page tables are to be good for.

        Raises:
            ValueError: a device is bound to another iommufd.
            IoasLayoutError: ENOENT, there is no file of a name; EFBIG, a file is too short;
                EADDRINUSE, the hardware has no room at an address. The error lists all that is
                wrong, of all three kinds.
            LuoError: as `IommuDevice.alloc_hwpt`, `Ioas.map_file` and `VfioDevice.attach` do.
        """
        for device in devices:
            device.iommu_device.id_in(iommufd)
        ioas = iommufd.alloc_ioas()
        hwpts: list[PagingHwpt] = []
        moved: list[tuple[VfioDevice, IommuObject | None]] = []
        try:
            if self.allowed:
                ioas.allow_iovas(self.allowed)
            # Attached to nothing yet, but from here on the IOAS knows how far the IOMMUs reach.
            by_iommu: dict[str, PagingHwpt] = {}
            for device in devices:
                if device.iommu not in by_iommu:
                    hwpt = device.iommu_device.alloc_hwpt(ioas, flags=flags)
                    by_iommu[device.iommu] = hwpt
                    hwpts.append(hwpt)
            self.check(ioas, files, devices)
            self._map(ioas, files)
            # A group moves as a whole, but only with one that is attached.
            for device in sorted(devices, key=lambda device: device.attached is None):
                if device.attached in hwpts:
                    continue  # it came along
                moved.append((device, device.attached))  # before, since a signal may come after
                _attach(device, ioas, flags, by_iommu[device.iommu], hwpts)
        except BaseException as error:
            _undo(error, ioas, hwpts, moved)
            raise
        replaced = dict.fromkeys(before for _, before in moved if before is not None)
        return Rebuilt(ioas, tuple(hwpts), tuple(replaced))

    def check(
        self,
        ioas: Ioas,
        files: AnyMapping[str, HasFileno] | FdStore,
        devices: Sequence[VfioDevice] = (),
    ) -> None:
        """Sees whether an IOAS has room for all of it, and the files are what they were.

        Args:
            ioas: which some page table or device has narrowed to what the hardware can.
            files: where the names lead.
            devices: that are to be attached to it, whose reserved addresses count too.

        Raises:
            IoasLayoutError: as `rebuild` does.
        """
        misfits = {
            errno.ENOENT: _find_missing(self.mappings, files),
            errno.EFBIG: _find_too_short(self.mappings, files),
            errno.EADDRINUSE: _find_out_of_reach(self.mappings, ioas, devices),
        }
        found = [misfit for of_one_kind in misfits.values() for misfit in of_one_kind]
        if found:
            number = next(number for number, of_one_kind in misfits.items() if of_one_kind)
            raise _misfit_error(number, found)

    def adopt(
        self, iommufd: IommuFd, object_id: int, files: AnyMapping[str, HasFileno] | FdStore
    ) -> Ioas:
        """The IOAS of this layout that exists already, in an iommufd handed over by its maker.

        Nothing is mapped: this process only comes to know what is.

        Args:
            iommufd: as received.
            object_id: the IOAS's `id` in the process that made it.
            files: where the names lead.

        Raises:
            IoasLayoutError: ENOENT, there is no file of a name, or something that the layout names
                is not mapped there.
            LuoError: ENOENT, the iommufd has no IOAS of this id.
        """
        if misfits := _find_missing(self.mappings, files):
            raise _misfit_error(errno.ENOENT, misfits)
        ioas = Ioas(iommufd, object_id)
        try:
            ioas.iova_ranges()  # fails if there is none
            unmapped = [one for one in self.mappings if not ioas.maps(one.range)]
            if unmapped:
                raise _misfit_error(
                    errno.ENOENT, [f"{one.range} of {ioas} is not mapped" for one in unmapped]
                )
            for mapping in self.mappings:
                with _open_named(files, mapping.name) as file:
                    ioas.adopt(_to_mapping(mapping, file), file)
            ioas.allowed = self.allowed
        except BaseException:
            ioas.forget()
            raise
        return ioas

    def _map(self, ioas: Ioas, files: AnyMapping[str, HasFileno] | FdStore) -> None:
        for mapping in self.mappings:
            with _open_named(files, mapping.name) as file:
                ioas.map_file(
                    file,
                    offset=mapping.offset,
                    length=mapping.length,
                    iova=mapping.iova,
                    access=mapping.access,
                )


@contextmanager
def _open_named(files: AnyMapping[str, HasFileno] | FdStore, name: str) -> Iterator[HasFileno]:
    """A file by its name. What a store gives out is closed: what is mapped needs no descriptor."""
    if isinstance(files, FdStore):
        with files.borrow(name) as own:
            yield own
    else:
        yield files[name]


def _to_named(
    ioas: Ioas, mapping: Mapping, names: AnyMapping[tuple[int, int], str]
) -> NamedMapping:
    subject = f"{ioas}: {mapping.range}"
    if mapping.file is None:
        hint = "It is mapped by its address in this process: map a file with `Ioas.map_file`"
        raise _error(errno.EINVAL, "record", subject, hint)
    if mapping.file not in names:
        hint = f"None of {sorted(names.values())} is the file that is mapped there"
        raise _error(errno.ENOENT, "record", subject, hint)
    return NamedMapping(
        mapping.iova, mapping.length, mapping.access, names[mapping.file], mapping.offset
    )


def _to_mapping(mapping: NamedMapping, file: HasFileno) -> Mapping:
    stat = os.fstat(file.fileno())
    identity = (stat.st_dev, stat.st_ino)
    return Mapping(mapping.iova, mapping.length, mapping.access, identity, mapping.offset)


def _find_missing(
    mappings: Sequence[NamedMapping], files: AnyMapping[str, HasFileno] | FdStore
) -> list[str]:
    return [
        f"{mapping.range} is of {mapping.name!r}, which is not there"
        for mapping in mappings
        if mapping.name not in files
    ]


def _find_too_short(
    mappings: Sequence[NamedMapping], files: AnyMapping[str, HasFileno] | FdStore
) -> list[str]:
    sizes = {}
    for name in dict.fromkeys(mapping.name for mapping in mappings if mapping.name in files):
        with _open_named(files, name) as file:
            sizes[name] = os.fstat(file.fileno()).st_size
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
            f"{mapping.range} meets {one}, reserved for {device}"
            for device, ranges in reserved
            for one in ranges
            if mapping.range.overlaps(one)
        ]
    return misfits


def _attach(
    device: VfioDevice, ioas: Ioas, flags: HwptFlags, shared: PagingHwpt, hwpts: list[PagingHwpt]
) -> None:
    """Attaches a device to the page table of its IOMMU, or to an own one where that suits not."""
    try:
        device.attach(shared)
    except LuoError as error:
        if error.errno != errno.EINVAL or not shared.users:
            raise
        own = device.iommu_device.alloc_hwpt(ioas, flags=flags)
        hwpts.append(own)
        device.attach(own)


def _undo(
    error: BaseException,
    ioas: Ioas,
    hwpts: Sequence[PagingHwpt],
    moved: Sequence[tuple[VfioDevice, IommuObject | None]],
) -> None:
    """Puts devices back where they were, and takes away what was made; notes what does not go."""
    for device, before in reversed(moved):
        try:
            if before is None:
                device.detach_pt()
            else:
                device.attach(before)
        except (LuoError, ValueError) as failed:
            error.add_note(f"{device} could not be put back: {failed}")
    for made in (*hwpts, ioas):
        try:
            made.destroy()
        except LuoError as failed:
            error.add_note(f"What was made is still there: {failed}")


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _misfit_error(number: int, misfits: Sequence[str]) -> IoasLayoutError:
    return _error(number, "check", "layout", "; ".join(misfits) + ". Nothing was mapped")


def _error(number: int, operation: str, subject: str, hint: str) -> IoasLayoutError:
    return IoasLayoutError(number, f"IoasLayout.{operation}", subject, hint)
