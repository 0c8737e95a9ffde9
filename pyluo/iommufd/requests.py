"""What all requests to an iommufd have in common."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl
from pyluo.errors import IommuError, IommuUnsupportedError, KernelTooOldError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyluo.operation import Refusal

__all__ = ["LOCKED_MEMORY", "iommu_ioctl"]

LOCKED_MEMORY = (
    "There is no memory, or RLIMIT_MEMLOCK, which applies to processes without CAP_IPC_LOCK, is "
    "too low; see `IommuFd.accounting`"
)
_USUAL: dict[int, Refusal] = {
    errno.ENOTTY: KernelTooOldError,
    errno.EOPNOTSUPP: IommuUnsupportedError,
}


def iommu_ioctl(name: str, struct: str, refusals: Mapping[int, Refusal] | None = None) -> Ioctl:
    """Return an ioctl of an iommufd.

    Args:
        name: the kernel's name of the ioctl.
        struct: the name of its struct.
        refusals: what an errno means, beyond what it means for each ioctl of an iommufd.

    Source: include/uapi/linux/iommufd.h, "General ioctl format"
    """
    return Ioctl(name, struct, IommuError, _USUAL | dict(refusals or {}))
