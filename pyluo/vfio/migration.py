"""Migration: saving a device's internal state, and loading it into another device."""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, Struct, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import VfioError
from pyluo.operation import Operation
from pyluo.vfio.features import Feature, Features, feature_data

if TYPE_CHECKING:
    from pyluo._sys import Buffer
    from pyluo.vfio.requests import OpenDevice

__all__ = ["Migration", "MigrationData", "MigrationFlags", "MigrationState", "PrecopyInfo"]

_READ, _WRITE = Operation("read", VfioError), Operation("write", VfioError)
_PRECOPY_INFO = Ioctl("VFIO_MIG_GET_PRECOPY_INFO", "vfio_precopy_info", VfioError, size="argsz")
_FLAGS = Struct("vfio_device_feature_migration")
_STATE = Struct("vfio_device_feature_mig_state")
_DATA_SIZE = Struct("vfio_device_feature_mig_data_size")
_REINIT = constant("VFIO_PRECOPY_INFO_REINIT")


class MigrationFlags(enum.IntFlag):
    """The states that a device supports in addition to RUNNING and ERROR.

    Source: include/uapi/linux/vfio.h, VFIO_MIGRATION_*
    """

    STOP_COPY = constant("VFIO_MIGRATION_STOP_COPY")
    """The device supports STOP, STOP_COPY and RESUMING, as every device with migration does."""
    P2P = constant("VFIO_MIGRATION_P2P")
    """The device supports RUNNING_P2P, and PRE_COPY_P2P if it also has the flag PRE_COPY."""
    PRE_COPY = constant("VFIO_MIGRATION_PRE_COPY")
    """The device supports PRE_COPY."""


class MigrationState(enum.IntEnum):
    """The migration state of a device.

    Source: include/uapi/linux/vfio.h, enum vfio_device_mig_state
    """

    ERROR = constant("VFIO_DEVICE_STATE_ERROR")
    """The device failed; a reset brings it back to RUNNING."""
    STOP = constant("VFIO_DEVICE_STATE_STOP")
    """The device is stopped: it changes neither its own state nor anything outside."""
    RUNNING = constant("VFIO_DEVICE_STATE_RUNNING")
    STOP_COPY = constant("VFIO_DEVICE_STATE_STOP_COPY")
    """The device is stopped, and its internal state can be read."""
    RESUMING = constant("VFIO_DEVICE_STATE_RESUMING")
    """The device is stopped, and an internal state can be written to it."""
    RUNNING_P2P = constant("VFIO_DEVICE_STATE_RUNNING_P2P")
    """The device is running, but does no DMA to other devices."""
    PRE_COPY = constant("VFIO_DEVICE_STATE_PRE_COPY")
    """The device is running; its internal state can be read, and later the changes to it."""
    PRE_COPY_P2P = constant("VFIO_DEVICE_STATE_PRE_COPY_P2P")
    """Like PRE_COPY, but the device does no DMA to other devices."""


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """Estimates of how much data can be read before the device is stopped.

    Attributes:
        initial: the bytes of data that should be read before the device is stopped.
        dirty: the bytes of data that have changed since they were read.
        reinitialized: whether the stream has new initial data, for example because the device was
            reconfigured; `initial` and `dirty` are counted anew then. Reported only after
            `Migration.enable_reinit`.
    """

    initial: int
    dirty: int
    reinitialized: bool


class MigrationData(OwnedFd):
    """A stream of a device's internal state: read it to save the state, write it to restore one.

    Only the device understands the data; pass it on unchanged.
    """

    __slots__ = ()

    def read(self, length: int) -> bytes | None:
        """Read up to `length` bytes.

        Returns:
            The bytes; b"" at the end of the stream; None if there is no data at the moment
            (ENOMSG).

        Raises:
            VfioError: the device has left the migration state that the stream is for (ENODEV).
        """
        with _READ.raising("migration data"):
            try:
                return os.read(self.fileno(), length)
            except OSError as error:
                if error.errno == errno.ENOMSG:
                    return None
                raise

    def write(self, data: Buffer) -> None:
        """Write all of `data`.

        Raises:
            VfioError: the device does not accept the data (EINVAL); it has left RESUMING (ENODEV).
        """
        view = memoryview(data).cast("B")
        with _WRITE.raising("migration data"):
            while view:
                view = view[os.write(self.fileno(), view) :]

    def precopy_info(self) -> PrecopyInfo:
        """Return how much data can be read before the device is stopped.

        Raises:
            VfioError: the device is in neither PRE_COPY nor PRE_COPY_P2P (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_MIG_GET_PRECOPY_INFO. Linux 6.2.
        """
        reply = _PRECOPY_INFO(self.fileno(), "migration data")
        return PrecopyInfo(
            reply.integer("initial_bytes"),
            reply.integer("dirty_bytes"),
            bool(reply.integer("flags") & _REINIT),
        )


class Migration:
    """Access to the internal state of a device; see `VfioDevice.migration`.

    Each request raises FeatureNotSupportedError (ENOTTY) if the device's driver does not support
    migration. vfio-pci does not; its variants for certain devices do.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIGRATION. Linux 5.18.
    """

    __slots__ = ("_features",)

    def __init__(self, device: OpenDevice) -> None:
        self._features = Features(device)

    def flags(self) -> MigrationFlags:
        """Return the flags that tell which states the device supports."""
        reply = self._features.get(Feature.MIGRATION, bytes(_FLAGS.size))
        return MigrationFlags(_FLAGS.unpack(feature_data(reply)).integer("flags"))

    @property
    def state(self) -> MigrationState:
        """The device's migration state."""
        reply = self._features.get(Feature.MIGRATION_STATE, bytes(_STATE.size))
        return MigrationState(_STATE.unpack(feature_data(reply)).integer("device_state"))

    def set_state(self, state: MigrationState) -> MigrationData | None:
        """Move the device to a state, through other states if necessary.

        Returns:
            A new stream if the device begins to save its state (PRE_COPY, PRE_COPY_P2P or
            STOP_COPY) or to load one (RESUMING); otherwise None. A move among the three saving
            states continues the previous stream, so that the result is None.

        Raises:
            VfioError: the device does not support the state, or cannot reach it (EINVAL). The
                device may then be in a state on the way, or in ERROR: see `state`.
        """
        data = _STATE.pack(device_state=state, data_fd=-1)
        reply = self._features.set(Feature.MIGRATION_STATE, data)
        fd = _STATE.unpack(feature_data(reply)).integer("data_fd")
        return MigrationData(fd) if fd >= 0 else None

    def data_size(self) -> int:
        """Return an estimate of how many bytes must be read in STOP_COPY.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE. Linux 6.2.
        """
        reply = self._features.get(Feature.MIGRATION_DATA_SIZE, bytes(_DATA_SIZE.size))
        return _DATA_SIZE.unpack(feature_data(reply)).integer("stop_copy_length")

    def enable_reinit(self) -> None:
        """Make the kernel report `PrecopyInfo.reinitialized`.

        Raises:
            VfioError: the device has no PRE_COPY state (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2. Linux 7.1.
        """
        self._features.set(Feature.PRECOPY_INFO_V2)
