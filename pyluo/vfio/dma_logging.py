"""DMA logging: a device itself logs which memory it has written to."""

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
    """A device's own log of the memory that it has written to; see `VfioDevice.dma_logging`.

    This is an alternative for IOMMUs without dirty tracking. Most devices do not support it, and
    raise FeatureNotSupportedError.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_START. Linux 6.1.
    """

    __slots__ = ("_features",)

    def __init__(self, device: OpenDevice) -> None:
        self._features = Features(device)

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Start logging.

        Args:
            ranges: the ranges of IOVAs to log. Their start and length are multiples of `page_size`,
                and they do not overlap. Up to 256 ranges are always possible.
            page_size: the preferred granularity of the log in bytes; the device may use another.

        Returns:
            The granularity that the device uses, in bytes.

        Raises:
            FeatureNotSupportedError: the device cannot log (ENOTTY).
            VfioError: ranges overlap or are not aligned, or logging is already on (EINVAL); there
                are too many ranges (E2BIG); a range exceeds 64 bits (EOVERFLOW).
        """
        array = b"".join(
            _RANGE.pack(iova=one.start, length=one.last - one.start + 1) for one in ranges
        )
        control = _CONTROL.pack(page_size=page_size, num_ranges=len(ranges), ranges=array or 0)
        reply = self._features.set(Feature.DMA_LOGGING_START, control)
        return _CONTROL.unpack(feature_data(reply)).integer("page_size")

    def stop(self) -> None:
        """Stop logging.

        Raises:
            FeatureNotSupportedError: the device cannot log (ENOTTY).
        """
        self._features.set(Feature.DMA_LOGGING_STOP)

    def report(self, wanted: IovaRange, *, page_size: int = 4096) -> DirtyBitmap:
        """Return the pages of a range that the device has written to, and clear their log.

        After an error, assume that all of the range was written to.

        Args:
            wanted: the range of IOVAs.
            page_size: the number of bytes that one bit stands for; a power of two, at least 4096.

        Raises:
            FeatureNotSupportedError: the device cannot log (ENOTTY).
            VfioError: logging is off, or the page size is less than 4096 (EINVAL); the range
                exceeds 64 bits (EOVERFLOW).
            ValueError: the page size is not a power of two.
        """
        bits, pages = DirtyBitmap.make_buffer(wanted, page_size)
        report = _REPORT.pack(
            iova=wanted.start, length=wanted.length, page_size=page_size, bitmap=bits
        )
        self._features.get(Feature.DMA_LOGGING_REPORT, report)
        return DirtyBitmap(wanted.start, page_size, pages, bytes(bits))
