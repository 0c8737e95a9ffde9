"""A device bound to an iommufd, as far as a vIOMMU needs to know it."""

from __future__ import annotations

from pyluo.iommufd.objects import IommuObject

__all__ = ["BoundDevice"]


class BoundDevice(IommuObject):
    """A device that is bound to an iommufd, known to the kernel by its id.

    Users get an `IommuDevice`, which adds the requests.
    """

    noun = "device"

    def hold_iommufd(self) -> None:
        """Note that an open VFIO device is behind this object, which keeps the iommufd alive."""
        self.keeps_iommufd = True
