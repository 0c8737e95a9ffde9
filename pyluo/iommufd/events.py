"""Queues of what goes wrong in an IOMMU: I/O page faults, and the events of a virtual IOMMU."""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import Struct, constant, raising
from pyluo.errors import LuoError
from pyluo.iommufd.objects import IommuObject

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyluo.descriptor import OwnedFd
    from pyluo.iommufd.objects import IommuContext

__all__ = [
    "FaultAccess",
    "FaultQueue",
    "PageFault",
    "VirtualEvent",
    "VirtualEventQueue",
    "VirtualEventType",
    "event_size",
    "parse_events",
    "parse_faults",
]

_FAULT = Struct("iommu_hwpt_pgfault")
_RESPONSE = Struct("iommu_hwpt_page_response")
_HEADER = Struct("iommufd_vevent_header")

_PASID_VALID = constant("IOMMU_PGFAULT_FLAGS_PASID_VALID")
_LAST_PAGE = constant("IOMMU_PGFAULT_FLAGS_LAST_PAGE")
_SUCCESS = constant("IOMMUFD_PAGE_RESP_SUCCESS")
_INVALID = constant("IOMMUFD_PAGE_RESP_INVALID")
_LOST_EVENTS = constant("IOMMU_VEVENTQ_FLAG_LOST_EVENTS")
_SEQUENCES = 1 << 31  # they start again from 0 after 2^31 - 1
_LARGEST_GROUP = 1 << 20  # bytes; a group of faults is read as a whole


class FaultAccess(enum.IntFlag):
    """What a device wanted to do at an address.

    Source: include/uapi/linux/iommufd.h, enum iommu_hwpt_pgfault_perm
    """

    READ = constant("IOMMU_PGFAULT_PERM_READ")
    WRITE = constant("IOMMU_PGFAULT_PERM_WRITE")
    EXECUTE = constant("IOMMU_PGFAULT_PERM_EXEC")
    PRIVILEGED = constant("IOMMU_PGFAULT_PERM_PRIV")


@dataclass(frozen=True, slots=True)
class PageFault:
    """A page that a device asked for and did not find.

    Attributes:
        device_id: the id of the device in the iommufd.
        pasid: of the device's access; None if it had none.
        group: the number of the group of faults that it belongs to.
        access: what the device wanted to do.
        address: of the fault.
        length: in bytes, how much the device is expected to ask for; 0 if it is not known.
        cookie: what the answer to the group names.
        last: whether it is the last one of its group.

    Source: include/uapi/linux/iommufd.h, struct iommu_hwpt_pgfault. Linux 6.11.
    """

    device_id: int
    pasid: int | None
    group: int
    access: FaultAccess
    address: int
    length: int
    cookie: int
    last: bool


class VirtualEventType(enum.IntEnum):
    """Whose format the events of a queue have.

    Source: include/uapi/linux/iommufd.h, enum iommu_veventq_type
    """

    ARM_SMMUV3 = constant("IOMMU_VEVENTQ_TYPE_ARM_SMMUV3")
    """A 256-bit event record, little-endian. Linux 6.15."""
    TEGRA241_CMDQV = constant("IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV")
    """A 128-bit map of errors, little-endian. Linux 6.17."""


_EVENT_SIZES: dict[int, int] = {
    VirtualEventType.ARM_SMMUV3: Struct("iommu_vevent_arm_smmuv3").size,
    VirtualEventType.TEGRA241_CMDQV: Struct("iommu_vevent_tegra241_cmdqv").size,
}


@dataclass(frozen=True, slots=True)
class VirtualEvent:
    """Something that a virtual IOMMU is to tell its guest.

    Attributes:
        sequence: counts all events of the queue, the lost ones too; after 2^31 - 1 comes 0.
        data: the event in its IOMMU's format; empty where it says only that events up to this
            number were lost.
        lost: how many events between the one before and this one did not fit into the queue, with
            this one if it has no data.

    Source: include/uapi/linux/iommufd.h, struct iommufd_vevent_header. Linux 6.15.
    """

    sequence: int
    data: bytes
    lost: int


class _EventObject(IommuObject):
    """An object with a descriptor of its own, from which its events are read."""

    def __init__(
        self, iommufd: IommuContext, object_id: int, file: OwnedFd, *uses: IommuObject
    ) -> None:
        try:
            super().__init__(iommufd, object_id, *uses)
        except BaseException:
            file.close()
            raise
        self._file = file

    def fileno(self) -> int:
        """The descriptor, for poll(2): readable when there is something to read.

        Raises:
            ValueError: it is closed.
        """
        return self._file.fileno()

    def destroy(self) -> None:
        """Closes the descriptor and destroys the queue; a second time does nothing.

        Raises:
            ObjectInUseError: EBUSY, something still reports to it, and nothing has changed; or the
                descriptor is open elsewhere too, and only closed here.
        """
        if self._users:
            raise self._in_use()
        self._file.close()  # the kernel counts it as a user
        super().destroy()

    def forget(self) -> None:
        """Notes that it is gone; closes the descriptor."""
        self._file.close()
        super().forget()

    def give_up(self) -> None:
        """Notes that the iommufd is given up; the descriptor stays, and its events can be read."""
        super().forget()

    def _read(self, room: int) -> bytes:
        """What there is to read; never waits, since the kernel does not."""
        while True:
            try:
                with raising("read", str(self)):
                    return os.read(self.fileno(), room)
            except LuoError as error:
                # What comes as a whole is longer than that.
                if error.errno != errno.EINVAL or room >= _LARGEST_GROUP:
                    raise
            room *= 2


class FaultQueue(_EventObject):
    """The I/O page faults of the HWPTs that were made with it, to be answered.

    Made by `IommuFd.alloc_fault_queue`. Linux 6.11.
    """

    noun = "fault queue"

    def read(self) -> list[PageFault]:
        """The faults that wait, whole groups of them; none if there are none. It never waits.

        At most a hundred come at once, unless one group has more.

        Raises:
            LuoError: ENOMEM; they can be read later.
            ValueError: the descriptor is closed.

        Source: drivers/iommu/iommufd/eventq.c, iommufd_fault_fops_read()
        """
        return parse_faults(self._read(100 * _FAULT.size))

    def respond(self, faults: PageFault | Iterable[PageFault], *, resolved: bool) -> None:
        """Answers the groups that faults belong to, once each.

        A device waits for the answer. Groups that were read and are not answered are answered as
        unresolved when the device is detached or the queue destroyed.

        Args:
            faults: any of each group.
            resolved: whether the device is to try again, the pages being mapped now.

        Raises:
            LuoError: EINVAL, a group was answered before, by the detaching of its device perhaps,
                or never read; all others are answered.

        Source: drivers/iommu/iommufd/eventq.c, iommufd_fault_fops_write()
        """
        given = [faults] if isinstance(faults, PageFault) else faults
        code = _SUCCESS if resolved else _INVALID
        refused: list[LuoError] = []
        for cookie in dict.fromkeys(fault.cookie for fault in given):
            try:
                with raising("write", f"{self}, group of cookie {cookie}"):
                    os.write(self.fileno(), _RESPONSE.pack(cookie=cookie, code=code))
            except LuoError as error:
                refused.append(error)  # a device waits for each of the others
        if refused:
            raise refused[0]


class VirtualEventQueue(_EventObject):
    """The events of a vIOMMU, of one format.

    Made by `Viommu.alloc_event_queue`. Linux 6.15.

    Args:
        event_size: in bytes, of what follows each header.
        following: the number of the next event if none is lost; None where that is not known, as of
            a queue that came from another process: then the first one tells of no loss.
    """

    noun = "virtual event queue"

    def __init__(
        self,
        iommufd: IommuContext,
        object_id: int,
        file: OwnedFd,
        event_size: int,
        *uses: IommuObject,
        following: int | None = None,
    ) -> None:
        super().__init__(iommufd, object_id, file, *uses)
        self._event_size = event_size
        self._next = following

    def read(self) -> list[VirtualEvent]:
        """The events that wait, some at a time; none if there are none. It never waits.

        Raises:
            LuoError: ENOMEM; they can be read later.
            ValueError: the descriptor is closed; or the events are not of the size that was given.

        Source: drivers/iommu/iommufd/eventq.c, iommufd_veventq_fops_read()
        """
        data = self._read(64 * (_HEADER.size + self._event_size))
        events = parse_events(data, self._event_size, self._next)
        if events:
            self._next = (events[-1].sequence + 1) % _SEQUENCES
        return events


def event_size(kind: int) -> int:
    """How long the events of a kind are, in bytes; 0 for one that is not known here."""
    return _EVENT_SIZES.get(kind, 0)


def parse_faults(data: bytes) -> list[PageFault]:
    """The faults in what a fault queue's descriptor gave.

    Raises:
        ValueError: it ends within one.
    """
    faults = []
    for offset in range(0, len(data), _FAULT.size):
        raw = _FAULT.unpack(data, offset).integer
        flags = raw("flags")
        faults.append(
            PageFault(
                device_id=raw("dev_id"),
                pasid=raw("pasid") if flags & _PASID_VALID else None,
                group=raw("grpid"),
                access=FaultAccess(raw("perm")),
                address=raw("addr"),
                length=raw("length"),
                cookie=raw("cookie"),
                last=bool(flags & _LAST_PAGE),
            )
        )
    return faults


def parse_events(data: bytes, event_size: int, expected: int | None = 0) -> list[VirtualEvent]:
    """The events in what a virtual event queue's descriptor gave.

    Args:
        data: as read.
        event_size: in bytes, of what follows each header.
        expected: the number that the first one has if none was lost; None if that is not known.

    Raises:
        ValueError: it ends within one, or the size is negative.
    """
    if event_size < 0:
        raise ValueError(f"events of {event_size} bytes")
    events = []
    offset = 0
    while offset < len(data):
        header = _HEADER.unpack(data, offset)
        offset += _HEADER.size
        sequence = header.integer("sequence") % _SEQUENCES
        lost = 0 if expected is None else (sequence - expected) % _SEQUENCES
        body = b""
        if header.integer("flags") & _LOST_EVENTS:
            lost += 1
        elif offset + event_size > len(data):
            raise ValueError(f"an event of {event_size} bytes is cut off after {len(data)} bytes")
        else:
            body = data[offset : offset + event_size]
            offset += event_size
        events.append(VirtualEvent(sequence, body, lost))
        expected = (sequence + 1) % _SEQUENCES
    return events
