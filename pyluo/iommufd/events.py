"""Queues that report I/O page faults, and events of virtual IOMMUs."""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import Struct, constant
from pyluo.errors import IommuError, RequestError
from pyluo.exclusive import exclusively
from pyluo.iommufd.objects import DESTROY, IommuObject
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyluo.descriptor import OwnedFd
    from pyluo.iommufd.objects import IommuContext

__all__ = [
    "LARGEST_EVENT",
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

_READ, _WRITE = Operation("read", IommuError), Operation("write", IommuError)
_FAULT = Struct("iommu_hwpt_pgfault")
_RESPONSE = Struct("iommu_hwpt_page_response")
_HEADER = Struct("iommufd_vevent_header")

_PASID_VALID = constant("IOMMU_PGFAULT_FLAGS_PASID_VALID")
_LAST_PAGE = constant("IOMMU_PGFAULT_FLAGS_LAST_PAGE")
_SUCCESS = constant("IOMMUFD_PAGE_RESP_SUCCESS")
_INVALID = constant("IOMMUFD_PAGE_RESP_INVALID")
_LOST_EVENTS = constant("IOMMU_VEVENTQ_FLAG_LOST_EVENTS")
_SEQUENCES = 1 << 31  # after the sequence number 2^31 - 1 comes 0
LARGEST_EVENT = 1 << 20  # bytes; real ones are much smaller
_LARGEST_GROUP = 1 << 20  # bytes; the kernel returns a group of faults only as a whole


class FaultAccess(enum.IntFlag):
    """The kinds of access that a device attempted.

    Source: include/uapi/linux/iommufd.h, enum iommu_hwpt_pgfault_perm
    """

    READ = constant("IOMMU_PGFAULT_PERM_READ")
    WRITE = constant("IOMMU_PGFAULT_PERM_WRITE")
    EXECUTE = constant("IOMMU_PGFAULT_PERM_EXEC")
    PRIVILEGED = constant("IOMMU_PGFAULT_PERM_PRIV")


@dataclass(frozen=True, slots=True)
class PageFault:
    """A page fault: a device tried to access a page that is not mapped.

    Attributes:
        device_id: the device's id in the iommufd.
        pasid: the PASID of the access; None if the access had no PASID.
        group: the number of the group of faults that this fault belongs to.
        access: the kinds of access that the device attempted.
        address: the faulting address.
        length: how many bytes the device is expected to access; 0 if this is not known.
        cookie: the kernel's identifier of the group, which the answer to the group contains.
        last: whether this is the last fault of its group.

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
    """The format of a queue's events.

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
    """An event of a virtual IOMMU, to be forwarded to the guest.

    Attributes:
        sequence: the event's number in the queue, in which lost events are counted too. After
            2^31 - 1 comes 0.
        data: the event in the IOMMU's format; empty if this event only reports that all events up
            to this number were lost.
        lost: the number of events between the previous event and this one that were lost because
            the queue was full, including this one if its data is empty.

    Source: include/uapi/linux/iommufd.h, struct iommufd_vevent_header. Linux 6.15.
    """

    sequence: int
    data: bytes
    lost: int


class _EventObject(IommuObject):
    """An iommufd object that has a descriptor of its own, from which events are read."""

    def __init__(self, iommufd: IommuContext, object_id: int, file: OwnedFd) -> None:
        try:
            super().__init__(iommufd, object_id)
        except BaseException:
            file.close()
            raise
        self._file = file

    def fileno(self) -> int:
        """Return the descriptor, for poll(2); poll reports it as readable if there are events.

        Raises:
            ValueError: the descriptor is closed.
        """
        return self._file.fileno()

    def _destroy(self) -> None:
        self._file.close()  # the kernel counts the open descriptor as a user
        super()._destroy()

    def forget(self) -> None:
        """Note that the kernel has destroyed the queue, and close the descriptor."""
        self._file.close()
        super().forget()

    def give_up(self) -> None:
        """Note that this process gave up the iommufd; events can still be read."""
        super().forget()

    def _read(self, room: int) -> bytes:
        """Return the data of waiting events, about `room` bytes; the kernel never blocks."""
        while True:
            try:
                with _READ.raising(str(self)):
                    return os.read(self.fileno(), room)
            except RequestError as error:
                # EINVAL: the first group or event is longer than the buffer.
                if error.errno != errno.EINVAL or room >= _LARGEST_GROUP:
                    raise
            room *= 2


class FaultQueue(_EventObject):
    """The I/O page faults of the HWPTs that were allocated with this queue.

    Each group of faults needs an answer. `IommuFd.alloc_fault_queue` creates a queue. Linux 6.11.
    """

    noun = "fault queue"

    def __init__(self, iommufd: IommuContext, object_id: int, file: OwnedFd) -> None:
        super().__init__(iommufd, object_id, file)
        self._served: list[IommuObject] = []

    def serve(self, hwpt: IommuObject) -> None:
        """Note that the queue has the faults of an HWPT; `destroy` refuses until that is destroyed.

        The kernel can only be asked to destroy the queue when its descriptor is closed. Without
        this note, a refusal would cost the descriptor, and nobody could answer faults any more.
        """
        self._served.append(hwpt)

    @exclusively
    def destroy(self) -> None:
        """Close the descriptor and destroy the queue; destroying it twice does nothing.

        Raises:
            IommuError: an HWPT that this process allocated still reports to the queue, and
                nothing has changed; or another process has the descriptor, or allocated an HWPT
                with this queue, and the descriptor was only closed here (EBUSY).

        Source: include/uapi/linux/iommufd.h, IOMMU_DESTROY. Linux 6.11.
        """
        if not self.destroyed and any(not hwpt.destroyed for hwpt in self._served):
            raise DESTROY.error(errno.EBUSY, str(self))
        self._destroy()

    def read(self) -> list[PageFault]:
        """Return the faults that are in the queue now, in whole groups; there may be none.

        At most a hundred faults are returned at once, unless one group has more.

        Raises:
            IommuError: there is too little memory (ENOMEM); the faults can be read later.
            ValueError: the descriptor is closed.

        Source: drivers/iommu/iommufd/eventq.c, iommufd_fault_fops_read()
        """
        return parse_faults(self._read(100 * _FAULT.size))

    def respond(self, faults: PageFault | Iterable[PageFault], *, resolved: bool) -> None:
        """Answer the groups that the faults belong to, each group once.

        The device waits for the answer. When the device is detached or the queue is destroyed, the
        kernel answers the remaining groups that were read as not resolved.

        Args:
            faults: at least one fault of each group to answer.
            resolved: whether the pages are mapped now, so that the device can try again.

        Raises:
            IommuError: a group was not read before, or has an answer already, perhaps because the
                device was detached (EINVAL). The other groups are answered nevertheless.

        Source: drivers/iommu/iommufd/eventq.c, iommufd_fault_fops_write()
        """
        given = [faults] if isinstance(faults, PageFault) else faults
        code = _SUCCESS if resolved else _INVALID
        refused: list[RequestError] = []
        for cookie in dict.fromkeys(fault.cookie for fault in given):
            try:
                with _WRITE.raising(f"{self}, group of cookie {cookie}"):
                    os.write(self.fileno(), _RESPONSE.pack(cookie=cookie, code=code))
            except RequestError as error:
                refused.append(error)  # answer the other groups first: devices wait for that
        if refused:
            raise refused[0]


class VirtualEventQueue(_EventObject):
    """The events of a vIOMMU; a queue has events of one format.

    `Viommu.alloc_event_queue` creates a queue. Linux 6.15.

    Args:
        event_size: the size of an event's data in bytes, without the header.
        next_sequence: the sequence number that the next event has if no event is lost; None if it
            is not known, as for a queue that another process created. Then the first event that is
            read has `lost` 0.
    """

    noun = "virtual event queue"

    def __init__(
        self,
        iommufd: IommuContext,
        object_id: int,
        file: OwnedFd,
        event_size: int,
        *,
        next_sequence: int | None = None,
    ) -> None:
        super().__init__(iommufd, object_id, file)
        self._event_size = event_size
        self._next_sequence = next_sequence

    @exclusively
    def destroy(self) -> None:
        """Close the descriptor and destroy the queue; destroying it twice does nothing.

        Raises:
            IommuError: another process has the descriptor, which was only closed here
                (EBUSY).
        """
        self._destroy()

    def read(self) -> list[VirtualEvent]:
        """Return events that are in the queue now, possibly not all; there may be none.

        Raises:
            IommuError: there is too little memory (ENOMEM); the events can be read later.
            ValueError: the descriptor is closed; or the events do not have `event_size` bytes.

        Source: drivers/iommu/iommufd/eventq.c, iommufd_veventq_fops_read()
        """
        data = self._read(64 * (_HEADER.size + self._event_size))
        events = parse_events(data, self._event_size, self._next_sequence)
        if events:
            self._next_sequence = (events[-1].sequence + 1) % _SEQUENCES
        return events


def event_size(kind: int) -> int:
    """Return the size in bytes of an event of this type; 0 if pyluo does not know the type."""
    return _EVENT_SIZES.get(kind, 0)


def parse_faults(data: bytes) -> list[PageFault]:
    """Return the faults in data that was read from a fault queue.

    Raises:
        ValueError: the data ends within a fault.
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
    """Return the events in data that was read from a virtual event queue.

    Args:
        data: the data.
        event_size: the size of an event's data in bytes, without the header.
        expected: the sequence number that the first event has if no event was lost; None if it is
            not known.

    Raises:
        ValueError: the data ends within an event, or the size is negative.
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
