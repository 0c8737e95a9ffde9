"""DMA logging: the device's own record of the memory it wrote to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo._sys import Struct
from pyluo.iommufd.hwpt import DirtyBitmap
from pyluo.vfio.features import Feature, Features, feature_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.iommufd.iova import IovaRange
    from pyluo.vfio.requests import OpenDevice

__all__ = ["DmaLogging"]

_CONTROL = Struct("vfio_device_feature_dma_logging_control")
_RANGE = Struct("vfio_device_feature_dma_logging_range")
_REPORT = Struct("vfio_device_feature_dma_logging_report")


class DmaLogging:
    """What a device wrote to, as `VfioDevice.dma_logging`.

    For IOMMUs that keep no such record; most devices keep none either: FeatureNotSupportedError.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_START. Linux 6.1.
    """

    __slots__ = ("_features",)

    def __init__(self, device: OpenDevice) -> None:
        self._features = Features(device)

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Begins to log.

        Args:
            ranges: multiples of `page_size` in start and length, not overlapping; 256 of them are
                always possible.
            page_size: how fine the record is to be, in bytes; a hint.

        Returns:
            How fine the device makes it, in bytes.

        Raises:
            FeatureNotSupportedError: ENOTTY, the device cannot.
            LuoError: EINVAL, ranges overlap or are not aligned, or logging is on; E2BIG, too many
                ranges; EOVERFLOW, a range goes beyond the end of all addresses.
        """
        array = b"".join(
            _RANGE.pack(iova=one.start, length=one.last - one.start + 1) for one in ranges
        )
        control = _CONTROL.pack(page_size=page_size, num_ranges=len(ranges), ranges=array or 0)
        reply = self._features.set(Feature.DMA_LOGGING_START, control)
        return _CONTROL.unpack(feature_data(reply)).integer("page_size")

    def stop(self) -> None:
        """Ends logging.

        Raises:
            FeatureNotSupportedError: ENOTTY, the device cannot log.
        """
        self._features.set(Feature.DMA_LOGGING_STOP)

    def report(self, wanted: IovaRange, *, page_size: int = 4096) -> DirtyBitmap:
        """What was written to in a range since it was last asked for, and forgets that.

        After an error all of the range counts as written to.

        Args:
            wanted: the range.
            page_size: what one bit stands for, in bytes; a power of two, at least 4096.

        Raises:
            FeatureNotSupportedError: ENOTTY, the device cannot log.
            LuoError: EINVAL, logging is off, or no such page size; EOVERFLOW, the range goes beyond
                the end of all addresses.
            ValueError: the page size is no power of two.
        """
        bits, pages = DirtyBitmap.make_buffer(wanted, page_size)
        report = _REPORT.pack(
            iova=wanted.start, length=wanted.length, page_size=page_size, bitmap=bits
        )
        self._features.get(Feature.DMA_LOGGING_REPORT, report)
        return DirtyBitmap(wanted.start, page_size, pages, bytes(bits))
