"""The PCI configuration space of a device: its header and its capabilities."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import constant
from pyluo.errors import VfioError
from pyluo.vfio.capabilities import CapabilityError
from pyluo.vfio.regions import Region

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Bar",
    "Command",
    "ConfigSpace",
    "PciCapability",
    "PciCapabilityId",
    "PciExtendedCapabilityId",
    "Status",
    "walk_capabilities",
    "walk_extended_capabilities",
]

_VENDOR = constant("PCI_VENDOR_ID")
_DEVICE = constant("PCI_DEVICE_ID")
_COMMAND = constant("PCI_COMMAND")
_STATUS = constant("PCI_STATUS")
_CLASS_REVISION = constant("PCI_CLASS_REVISION")
_HEADER_TYPE = constant("PCI_HEADER_TYPE")
_HEADER_TYPE_MASK = constant("PCI_HEADER_TYPE_MASK")
_HEADER_TYPE_NORMAL = constant("PCI_HEADER_TYPE_NORMAL")
_SUBSYSTEM_VENDOR = constant("PCI_SUBSYSTEM_VENDOR_ID")
_SUBSYSTEM = constant("PCI_SUBSYSTEM_ID")
_BASE_ADDRESS = constant("PCI_BASE_ADDRESS_0")
_BARS = constant("PCI_STD_NUM_BARS")
_SPACE_IO = constant("PCI_BASE_ADDRESS_SPACE_IO")
_TYPE_MASK = constant("PCI_BASE_ADDRESS_MEM_TYPE_MASK")
_TYPE_64 = constant("PCI_BASE_ADDRESS_MEM_TYPE_64")
_PREFETCH = constant("PCI_BASE_ADDRESS_MEM_PREFETCH")
_MEMORY_FLAGS = _SPACE_IO | _TYPE_MASK | _PREFETCH
_IO_FLAGS = _SPACE_IO | 2  # bit 1 is reserved
_CAPABILITY_LIST = constant("PCI_CAPABILITY_LIST")
_LIST_ID = constant("PCI_CAP_LIST_ID")
_LIST_NEXT = constant("PCI_CAP_LIST_NEXT")
_STATUS_LIST = constant("PCI_STATUS_CAP_LIST")
_HEADER_SIZE = constant("PCI_STD_HEADER_SIZEOF")
_PLAIN_SIZE = constant("PCI_CFG_SPACE_SIZE")

_ALIGNED = ~3  # capabilities begin at multiples of 4; the two low bits of an offset are reserved


class Command(enum.IntFlag):
    """The bits of the command register: what the device may do, and which accesses it answers.

    Source: include/uapi/linux/pci_regs.h, PCI_COMMAND_*
    """

    IO = constant("PCI_COMMAND_IO")
    MEMORY = constant("PCI_COMMAND_MEMORY")
    """The device answers memory accesses. Without it, an access to a mapping raises SIGBUS."""
    BUS_MASTER = constant("PCI_COMMAND_MASTER")
    """The device may do DMA, and may signal MSI and MSI-X."""
    SPECIAL = constant("PCI_COMMAND_SPECIAL")
    INVALIDATE = constant("PCI_COMMAND_INVALIDATE")
    VGA_PALETTE = constant("PCI_COMMAND_VGA_PALETTE")
    PARITY = constant("PCI_COMMAND_PARITY")
    WAIT = constant("PCI_COMMAND_WAIT")
    SERR = constant("PCI_COMMAND_SERR")
    FAST_BACK = constant("PCI_COMMAND_FAST_BACK")
    INTX_DISABLE = constant("PCI_COMMAND_INTX_DISABLE")


class Status(enum.IntFlag):
    """The bits of the status register.

    Source: include/uapi/linux/pci_regs.h, PCI_STATUS_*
    """

    IMMEDIATE_READINESS = constant("PCI_STATUS_IMM_READY")
    INTERRUPT = constant("PCI_STATUS_INTERRUPT")
    CAPABILITIES = constant("PCI_STATUS_CAP_LIST")
    MHZ_66 = constant("PCI_STATUS_66MHZ")
    USER_DEFINABLE = constant("PCI_STATUS_UDF")
    FAST_BACK = constant("PCI_STATUS_FAST_BACK")
    PARITY = constant("PCI_STATUS_PARITY")
    DEVSEL_MEDIUM = constant("PCI_STATUS_DEVSEL_MEDIUM")
    DEVSEL_SLOW = constant("PCI_STATUS_DEVSEL_SLOW")
    SIGNALED_TARGET_ABORT = constant("PCI_STATUS_SIG_TARGET_ABORT")
    RECEIVED_TARGET_ABORT = constant("PCI_STATUS_REC_TARGET_ABORT")
    RECEIVED_MASTER_ABORT = constant("PCI_STATUS_REC_MASTER_ABORT")
    SIGNALED_SYSTEM_ERROR = constant("PCI_STATUS_SIG_SYSTEM_ERROR")
    DETECTED_PARITY = constant("PCI_STATUS_DETECTED_PARITY")


class PciCapabilityId(enum.IntEnum):
    """The ids of the most common capabilities.

    Source: include/uapi/linux/pci_regs.h, PCI_CAP_ID_*
    """

    POWER_MANAGEMENT = constant("PCI_CAP_ID_PM")
    VITAL_PRODUCT_DATA = constant("PCI_CAP_ID_VPD")
    MSI = constant("PCI_CAP_ID_MSI")
    VENDOR = constant("PCI_CAP_ID_VNDR")
    EXPRESS = constant("PCI_CAP_ID_EXP")
    MSIX = constant("PCI_CAP_ID_MSIX")
    ADVANCED_FEATURES = constant("PCI_CAP_ID_AF")


class PciExtendedCapabilityId(enum.IntEnum):
    """The ids of the most common extended capabilities.

    Source: include/uapi/linux/pci_regs.h, PCI_EXT_CAP_ID_*
    """

    ADVANCED_ERROR_REPORTING = constant("PCI_EXT_CAP_ID_ERR")
    SERIAL_NUMBER = constant("PCI_EXT_CAP_ID_DSN")
    VENDOR = constant("PCI_EXT_CAP_ID_VNDR")
    ACCESS_CONTROL_SERVICES = constant("PCI_EXT_CAP_ID_ACS")
    ALTERNATE_ROUTING = constant("PCI_EXT_CAP_ID_ARI")
    ADDRESS_TRANSLATION = constant("PCI_EXT_CAP_ID_ATS")
    SRIOV = constant("PCI_EXT_CAP_ID_SRIOV")
    PAGE_REQUEST = constant("PCI_EXT_CAP_ID_PRI")
    RESIZABLE_BAR = constant("PCI_EXT_CAP_ID_REBAR")
    PASID = constant("PCI_EXT_CAP_ID_PASID")


@dataclass(frozen=True, slots=True)
class PciCapability:
    """A capability in configuration space.

    Attributes:
        id: the type: see `PciCapabilityId` or `PciExtendedCapabilityId`.
        offset: the offset of the first byte in configuration space.
        version: the version of an extended capability; 0 for others.
    """

    id: int
    offset: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register, as it appears in configuration space.

    VFIO emulates the register: writing to it does not move the region.

    Attributes:
        index: the index of the region; a 64-bit register occupies the next index too.
        address: the address of the region on the bus.
        io: whether the region consists of I/O ports.
        wide: whether the register has 64 bits.
        prefetchable: whether reads have no side effects.
    """

    index: int
    address: int
    io: bool
    wide: bool
    prefetchable: bool


class ConfigSpace(Region):
    """The configuration space of a PCI device, part of which the kernel emulates.

    Its registers have 8, 16 or 32 bits.

    Source: drivers/vfio/pci/vfio_pci_config.c. Linux 3.6.
    """

    __slots__ = ()

    widths: tuple[int, ...] = (8, 16, 32)

    @property
    def vendor_id(self) -> int:
        """The number of the vendor."""
        return self.read16(_VENDOR)

    @property
    def device_id(self) -> int:
        """The vendor's number for this model."""
        return self.read16(_DEVICE)

    @property
    def subsystem(self) -> tuple[int, int]:
        """The vendor's number and the subsystem id of the board that the device is on."""
        return self.read16(_SUBSYSTEM_VENDOR), self.read16(_SUBSYSTEM)

    @property
    def class_code(self) -> int:
        """The base class, subclass and programming interface, 8 bits each."""
        return self.read32(_CLASS_REVISION) >> 8

    @property
    def revision(self) -> int:
        """The revision of the device."""
        return self.read32(_CLASS_REVISION) & 0xFF

    @property
    def status(self) -> Status:
        """The status register."""
        return Status(self.read16(_STATUS))

    @property
    def command(self) -> Command:
        """The command register: what the device may do, and which accesses it answers.

        When a device is opened, `Command.BUS_MASTER` is off; set it before any DMA, MSI or MSI-X.
        Clearing `Command.MEMORY` while regions are mapped raises VfioError (EBUSY), because the
        next access to a mapping would end the process by SIGBUS.
        """
        return Command(self.read16(_COMMAND))

    @command.setter
    def command(self, wanted: Command) -> None:
        if Command.MEMORY not in wanted and self._device.mappings:
            raise VfioError(
                errno.EBUSY,
                "pwrite",
                self._subject("the command register without memory access"),
                f"{len(self._device.mappings)} mappings of regions are open, and an access to one "
                "would end the process by SIGBUS: close them first",
            )
        self.write16(_COMMAND, int(wanted))

    def set_bus_master(self, allowed: bool) -> None:
        """Allow or forbid the device's DMA, MSI and MSI-X."""
        others = self.command & ~Command.BUS_MASTER
        self.command = others | Command.BUS_MASTER if allowed else others

    def bars(self) -> tuple[Bar, ...]:
        """Return the base address registers that the device has; none if it is a bridge."""
        if self.read8(_HEADER_TYPE) & _HEADER_TYPE_MASK != _HEADER_TYPE_NORMAL:
            return ()
        words = [self.read32(_BASE_ADDRESS + 4 * index) for index in range(_BARS)]
        return tuple(_decode_bars(words))

    def capabilities(self) -> tuple[PciCapability, ...]:
        """Return the capabilities, in the order of their list.

        Raises:
            CapabilityError: the list is malformed.
        """
        return walk_capabilities(self.read(_PLAIN_SIZE, 0))

    def extended_capabilities(self) -> tuple[PciCapability, ...]:
        """Return the extended capabilities of a PCIe device, in the order of their list.

        Raises:
            CapabilityError: the list is malformed.
        """
        return walk_extended_capabilities(self.read(self.info.size, 0))

    def capability(self, wanted: int) -> PciCapability | None:
        """Return the first capability of a type; None if the device has none."""
        return next((one for one in self.capabilities() if one.id == wanted), None)

    def extended_capability(self, wanted: int) -> PciCapability | None:
        """Return the first extended capability of a type; None if the device has none."""
        return next((one for one in self.extended_capabilities() if one.id == wanted), None)


def walk_capabilities(data: bytes) -> tuple[PciCapability, ...]:
    """Return the capabilities in a configuration space; they are in its first 256 bytes.

    Raises:
        CapabilityError: the list leads into the header or back to an earlier capability, or the
            device does not respond.
    """
    plain = data[:_PLAIN_SIZE]
    if len(plain) < _PLAIN_SIZE:
        raise CapabilityError(f"{len(plain)} bytes are too short for a configuration space")
    if not int.from_bytes(plain[_STATUS : _STATUS + 2], "little") & _STATUS_LIST:
        return ()
    if plain.count(0xFF) == len(plain):
        raise CapabilityError("the device does not answer: all bits are read as ones")
    found: dict[int, PciCapability] = {}
    offset = plain[_CAPABILITY_LIST] & _ALIGNED
    while offset:
        if offset < _HEADER_SIZE:
            raise CapabilityError(f"a capability at {offset:#x}, within the header")
        if offset in found:
            raise CapabilityError(f"the list of capabilities comes back to {offset:#x}")
        found[offset] = PciCapability(plain[offset + _LIST_ID], offset)
        offset = plain[offset + _LIST_NEXT] & _ALIGNED
    return tuple(found.values())


def walk_extended_capabilities(data: bytes) -> tuple[PciCapability, ...]:
    """Return the extended capabilities in a configuration space; none if it has only 256 bytes.

    Raises:
        CapabilityError: the list leads out of the configuration space, into its first 256 bytes or
            back to an earlier capability, or the device does not respond.
    """
    found: dict[int, PciCapability] = {}
    offset = _PLAIN_SIZE if len(data) > _PLAIN_SIZE else 0
    while offset:
        if offset < _PLAIN_SIZE or offset + 4 > len(data):
            raise CapabilityError(f"an extended capability at {offset:#x}, of {len(data):#x} bytes")
        if offset in found:
            raise CapabilityError(f"the list of extended capabilities comes back to {offset:#x}")
        header = int.from_bytes(data[offset : offset + 4], "little")
        if header == 0xFFFF_FFFF:
            raise CapabilityError("the device does not answer: all bits are read as ones")
        found[offset] = PciCapability(header & 0xFFFF, offset, header >> 16 & 0xF)
        offset = header >> 20 & _ALIGNED
    # The first header has id 0 if there are no extended capabilities, or if the kernel hides the
    # first one.
    return tuple(one for one in found.values() if one.id)


def _decode_bars(words: list[int]) -> Iterator[Bar]:
    index = 0
    while index < len(words):
        word = words[index]
        if word & _SPACE_IO:
            yield Bar(index, word & ~_IO_FLAGS, io=True, wide=False, prefetchable=False)
        elif word & _TYPE_MASK == _TYPE_64 and index + 1 < len(words):
            address = words[index + 1] << 32 | word & ~_MEMORY_FLAGS
            yield Bar(index, address, False, True, bool(word & _PREFETCH))
            index += 1
        elif word:
            yield Bar(index, word & ~_MEMORY_FLAGS, False, False, bool(word & _PREFETCH))
        index += 1
