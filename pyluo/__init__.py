"""Python bindings for the kernel's Live Update Orchestrator. Importing them opens no file.

The *jump* is the kexec of a live update: the running kernel starts the next kernel directly,
without the firmware, and what is in open outgoing sessions survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo import kexec
from pyluo.descriptor import OwnedFd
from pyluo.errors import (
    AlreadyPreservedError,
    DeviceBusyError,
    DeviceInUseError,
    DriverNotFoundError,
    FdStoreError,
    FeatureNotSupportedError,
    HandoffError,
    HandoverError,
    ImageRejectedError,
    IncomingStateError,
    InvalidationError,
    IoasLayoutError,
    IommuUnavailableError,
    IommuUnsupportedError,
    IovaInUseError,
    KernelTooOldError,
    KexecBusyError,
    LiveUpdateUnavailableError,
    LuoError,
    LuoPermissionError,
    NoImageLoadedError,
    NotBoundError,
    NotPreservableError,
    ObjectInUseError,
    PciDeviceNotFoundError,
    PreservedMemoryError,
    SealedError,
    SessionExistsError,
    SessionNameError,
    SessionNotFoundError,
    SessionRetrievedError,
    TokenInUseError,
    TokenNotFoundError,
    UserMappingError,
    WrongSessionError,
)
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd, Seal
from pyluo.session import IncomingSession, OutgoingSession, session_from_fd

__all__ = [
    "AlreadyPreservedError",
    "DeviceBusyError",
    "DeviceInUseError",
    "DriverNotFoundError",
    "FdStore",
    "FdStoreError",
    "FeatureNotSupportedError",
    "HandoffError",
    "HandoverError",
    "ImageRejectedError",
    "IncomingSession",
    "IncomingStateError",
    "InvalidationError",
    "IoasLayout",
    "IoasLayoutError",
    "IommuUnavailableError",
    "IommuUnsupportedError",
    "IovaInUseError",
    "KernelTooOldError",
    "KexecBusyError",
    "LiveUpdate",
    "LiveUpdateUnavailableError",
    "LuoError",
    "LuoPermissionError",
    "Memfd",
    "NoImageLoadedError",
    "NotBoundError",
    "NotPreservableError",
    "ObjectInUseError",
    "OutgoingSession",
    "OwnedFd",
    "PciDeviceNotFoundError",
    "PreservedMemoryError",
    "Seal",
    "SealedError",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "SessionRetrievedError",
    "TokenInUseError",
    "TokenNotFoundError",
    "UserMappingError",
    "WrongSessionError",
    "handoff",
    "iommufd",
    "kexec",
    "kho",
    "session_from_fd",
    "vfio",
]

if TYPE_CHECKING:
    from pyluo import handoff, iommufd, kho, vfio
    from pyluo.fdstore import FdStore
    from pyluo.iommu_layout import IoasLayout

# These are imported on first use: importing them at once would take a tenth of a second after every
# jump of a guest.
_LAZY = {
    "handoff": "pyluo.handoff",
    "kho": "pyluo.kho",
    "iommufd": "pyluo.iommufd",
    "vfio": "pyluo.vfio",
    "FdStore": "pyluo.fdstore",
    "IoasLayout": "pyluo.iommu_layout",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_LAZY[name])
    return getattr(module, name, module)
