"""A device bound to an iommufd: what a vIOMMU needs to know of it."""

from __future__ import annotations

from pyluo.iommufd.objects import IommuObject

__all__ = ["BoundDevice"]


class BoundDevice(IommuObject):
    """A device that is bound to an iommufd, known to the kernel by its id.

    `IommuDevice` is the one that users get: it has the requests as well.
    """

    noun = "device"

    def hold_iommufd(self) -> None:
        """Note that an open VFIO device is behind this object, which keeps the iommufd alive."""
        self.keeps_iommufd = True
