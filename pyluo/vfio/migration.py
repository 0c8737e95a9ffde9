"""Migration: taking a device's own state out of it, and putting it into another."""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, Struct, constant, raising
from pyluo.descriptor import OwnedFd
from pyluo.vfio.features import Feature, Features, feature_data

if TYPE_CHECKING:
    from pyluo._sys import Buffer
    from pyluo.vfio.requests import OpenDevice

__all__ = ["Migration", "MigrationData", "MigrationFlags", "MigrationState", "PrecopyInfo"]

_PRECOPY_INFO = Ioctl("VFIO_MIG_GET_PRECOPY_INFO", "vfio_precopy_info", size="argsz")
_FLAGS = Struct("vfio_device_feature_migration")
_STATE = Struct("vfio_device_feature_mig_state")
_DATA_SIZE = Struct("vfio_device_feature_mig_data_size")
_REINIT = constant("VFIO_PRECOPY_INFO_REINIT")


class MigrationFlags(enum.IntFlag):
    """Which states a device has beyond RUNNING and ERROR.

    Source: include/uapi/linux/vfio.h, VFIO_MIGRATION_*
    """

    STOP_COPY = constant("VFIO_MIGRATION_STOP_COPY")
    """STOP, STOP_COPY and RESUMING: every device that can migrate."""
    P2P = constant("VFIO_MIGRATION_P2P")
    """RUNNING_P2P, and with PRE_COPY PRE_COPY_P2P."""
    PRE_COPY = constant("VFIO_MIGRATION_PRE_COPY")
    """PRE_COPY."""


class MigrationState(enum.IntEnum):
    """What a device is doing.

    Source: include/uapi/linux/vfio.h, enum vfio_device_mig_state
    """

    ERROR = constant("VFIO_DEVICE_STATE_ERROR")
    """It failed: a reset brings it back to RUNNING."""
    STOP = constant("VFIO_DEVICE_STATE_STOP")
    """It changes nothing, neither in itself nor outside."""
    RUNNING = constant("VFIO_DEVICE_STATE_RUNNING")
    STOP_COPY = constant("VFIO_DEVICE_STATE_STOP_COPY")
    """Stopped, and its state can be read."""
    RESUMING = constant("VFIO_DEVICE_STATE_RESUMING")
    """Stopped, and a state can be written."""
    RUNNING_P2P = constant("VFIO_DEVICE_STATE_RUNNING_P2P")
    """Running, without DMA to other devices."""
    PRE_COPY = constant("VFIO_DEVICE_STATE_PRE_COPY")
    """Running, and its state can be read, then what changed of it."""
    PRE_COPY_P2P = constant("VFIO_DEVICE_STATE_PRE_COPY_P2P")
    """PRE_COPY, without DMA to other devices."""


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """How much there is to read before the device is stopped; estimates.

    Attributes:
        initial: bytes of what is always transferred; best read before the device is stopped.
        dirty: bytes of what changed since it was read.
        reinitialized: whether `initial` began anew; told once `Migration.enable_reinit` was called.
    """

    initial: int
    dirty: int
    reinitialized: bool


class MigrationData(OwnedFd):
    """The stream of a device's state: to be read when saving, to be written when resuming.

    What is in it is the device's alone; it goes on as it came.
    """

    __slots__ = ()

    def read(self, length: int) -> bytes | None:
        """Up to `length` bytes; b"" at the end; None if there is nothing for now (ENOMSG).

        Raises:
            LuoError: ENODEV, the device left the state in which this stream was begun.
        """
        with raising("read", "migration data"):
            try:
                return os.read(self.fileno(), length)
            except OSError as error:
                if error.errno == errno.ENOMSG:
                    return None
                raise

    def write(self, data: Buffer) -> None:
        """Writes all of `data`.

        Raises:
            LuoError: EINVAL, the device cannot take it; ENODEV, it left RESUMING.
        """
        view = memoryview(data).cast("B")
        with raising("write", "migration data"):
            while view:
                view = view[os.write(self.fileno(), view) :]

    def precopy_info(self) -> PrecopyInfo:
        """How much there is to read before the device is stopped.

        Raises:
            LuoError: EINVAL, the device is in no PRE_COPY state.

        Source: include/uapi/linux/vfio.h, VFIO_MIG_GET_PRECOPY_INFO. Linux 6.2.
        """
        reply = _PRECOPY_INFO(self.fileno(), "migration data")
        return PrecopyInfo(
            reply.integer("initial_bytes"),
            reply.integer("dirty_bytes"),
            bool(reply.integer("flags") & _REINIT),
        )


class Migration:
    """The state of a device's own, as `VfioDevice.migration`.

    Every request raises FeatureNotSupportedError (ENOTTY) where the device's driver knows no
    migration: vfio-pci does not, its variants for some devices do.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIGRATION. Linux 5.18.
    """

    __slots__ = ("_features",)

    def __init__(self, device: OpenDevice) -> None:
        self._features = Features(device)

    def flags(self) -> MigrationFlags:
        """Which states the device has."""
        reply = self._features.get(Feature.MIGRATION, bytes(_FLAGS.size))
        return MigrationFlags(_FLAGS.unpack(feature_data(reply)).integer("flags"))

    @property
    def state(self) -> MigrationState:
        """What the device is doing."""
        reply = self._features.get(Feature.MIGRATION_STATE, bytes(_STATE.size))
        return MigrationState(_STATE.unpack(feature_data(reply)).integer("device_state"))

    def set_state(self, state: MigrationState) -> MigrationData | None:
        """Leads the device to a state, by way of those between.

        Returns:
            A stream, if the way to the state begins one: to STOP_COPY, PRE_COPY and RESUMING, not
            from PRE_COPY to STOP_COPY, where the stream goes on.

        Raises:
            LuoError: EINVAL, the device has no such state, or no way leads there. It may be in a
                state between then, or in ERROR: see `state`.
        """
        data = _STATE.pack(device_state=state, data_fd=-1)
        reply = self._features.set(Feature.MIGRATION_STATE, data)
        fd = _STATE.unpack(feature_data(reply)).integer("data_fd")
        return MigrationData(fd) if fd >= 0 else None

    def data_size(self) -> int:
        """How many bytes STOP_COPY would still have to transfer; an estimate.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE. Linux 6.2.
        """
        reply = self._features.get(Feature.MIGRATION_DATA_SIZE, bytes(_DATA_SIZE.size))
        return _DATA_SIZE.unpack(feature_data(reply)).integer("stop_copy_length")

    def enable_reinit(self) -> None:
        """Has `PrecopyInfo.reinitialized` told.

        Raises:
            LuoError: EINVAL, the device has no PRE_COPY state.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2. Linux 7.1.
        """
        self._features.set(Feature.PRECOPY_INFO_V2)
