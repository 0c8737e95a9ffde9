"""Python bindings for the kernel's Live Update Orchestrator. Importing them opens no file.

The *jump* is the kexec of a live update: the running kernel starts the next kernel directly,
without the firmware, and what is in open outgoing sessions survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo import handoff, iommufd, kexec, kho, vfio
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
    from pyluo.fdstore import FdStore
    from pyluo.iommu_layout import IoasLayout
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

# The modules that define the names. A name is imported when it is first used: importing all of them
# takes a quarter of a second after every jump of an emulated guest, and pytest imports this package
# in every run of a project that has pyluo installed.
_HOMES = {
    "descriptor": ("OwnedFd",),
    "errors": (
        "AlreadyPreservedError",
        "DeviceBusyError",
        "DeviceInUseError",
        "DriverNotFoundError",
        "FdStoreError",
        "FeatureNotSupportedError",
        "HandoffError",
        "HandoverError",
        "ImageRejectedError",
        "IncomingStateError",
        "InvalidationError",
        "IoasLayoutError",
        "IommuUnavailableError",
        "IommuUnsupportedError",
        "IovaInUseError",
        "KernelTooOldError",
        "KexecBusyError",
        "LiveUpdateUnavailableError",
        "LuoError",
        "LuoPermissionError",
        "NoImageLoadedError",
        "NotBoundError",
        "NotPreservableError",
        "ObjectInUseError",
        "PciDeviceNotFoundError",
        "PreservedMemoryError",
        "SealedError",
        "SessionExistsError",
        "SessionNameError",
        "SessionNotFoundError",
        "SessionRetrievedError",
        "TokenInUseError",
        "TokenNotFoundError",
        "UserMappingError",
        "WrongSessionError",
    ),
    "fdstore": ("FdStore",),
    "iommu_layout": ("IoasLayout",),
    "liveupdate": ("LiveUpdate",),
    "memfd": ("Memfd", "Seal"),
    "session": ("IncomingSession", "OutgoingSession", "session_from_fd"),
}
_MODULES = ("handoff", "iommufd", "kexec", "kho", "vfio")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(f"{__name__}.{home}")
            globals().update((each, getattr(module, each)) for each in names)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
