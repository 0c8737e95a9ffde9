"""The base class of `IommuDevice`, which `Viommu` needs."""

from __future__ import annotations

from pyluo.iommufd.objects import IommuObject

__all__ = ["BoundDevice"]


class BoundDevice(IommuObject):
    """A device that is bound to an iommufd, identified by its id.

    Callers get an `IommuDevice`, which is derived from this class and makes requests.
    """

    noun = "device"
