"""Python bindings for the kernel's Live Update Orchestrator. Importing them opens no file.

The *jump* is the kexec of a live update: the running kernel starts the next kernel directly,
without the firmware, and what is in open outgoing sessions survives.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what every import of pyluo imports must be quick: typing is not
if TYPE_CHECKING:
    from pyluo import handoff, iommufd, kexec, kho, kvm, update, vfio
    from pyluo import network as network
    from pyluo.descriptor import OwnedFd
    from pyluo.errors import (
        AlreadyPreservedError,
        DeviceBusyError,
        DeviceInUseError,
        DriverNotFoundError,
        FeatureNotSupportedError,
        HandoffError,
        HandoverError,
        ImageRejectedError,
        ImageSignatureError,
        IncomingStateError,
        InvalidationError,
        IoasLayoutError,
        IommuError,
        IommuUnavailableError,
        IommuUnsupportedError,
        KeeperError,
        KernelTooOldError,
        KexecBusyError,
        KexecError,
        KvmError,
        LiveUpdateUnavailableError,
        LuoError,
        NotPermittedError,
        NotPreservableError,
        PciDeviceNotFoundError,
        PreservedMemoryError,
        RequestError,
        SealedError,
        SessionExistsError,
        SessionNameError,
        SessionNotFoundError,
        SessionRetrievedError,
        StoreError,
        TokenInUseError,
        TokenNotFoundError,
        UserMappingError,
        VfioError,
    )
    from pyluo.guest_ram import GuestRam
    from pyluo.iommu_layout import IoasLayout
    from pyluo.keepers.holder import HolderProcess
    from pyluo.keepers.keeper import Keeper, KeeperChoice
    from pyluo.keepers.service_manager import ServiceManager
    from pyluo.liveupdate import LiveUpdate
    from pyluo.memfd import Memfd, Seal
    from pyluo.numa import NumaMode, NumaPolicy
    from pyluo.session import IncomingSession, OutgoingSession, session_from_fd
    from pyluo.state_format import StateFormat
    from pyluo.stores.entry import Entry, NewEntry
    from pyluo.stores.incoming import IncomingStore
    from pyluo.stores.outgoing import OutgoingStore

__all__ = [
    "AlreadyPreservedError",
    "DeviceBusyError",
    "DeviceInUseError",
    "DriverNotFoundError",
    "Entry",
    "FeatureNotSupportedError",
    "GuestRam",
    "HandoffError",
    "HandoverError",
    "HolderProcess",
    "ImageRejectedError",
    "ImageSignatureError",
    "IncomingSession",
    "IncomingStateError",
    "IncomingStore",
    "InvalidationError",
    "IoasLayout",
    "IoasLayoutError",
    "IommuError",
    "IommuUnavailableError",
    "IommuUnsupportedError",
    "Keeper",
    "KeeperChoice",
    "KeeperError",
    "KernelTooOldError",
    "KexecBusyError",
    "KexecError",
    "KvmError",
    "LiveUpdate",
    "LiveUpdateUnavailableError",
    "LuoError",
    "Memfd",
    "NewEntry",
    "NotPermittedError",
    "NotPreservableError",
    "NumaMode",
    "NumaPolicy",
    "OutgoingSession",
    "OutgoingStore",
    "OwnedFd",
    "PciDeviceNotFoundError",
    "PreservedMemoryError",
    "RequestError",
    "Seal",
    "SealedError",
    "ServiceManager",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "SessionRetrievedError",
    "StateFormat",
    "StoreError",
    "TokenInUseError",
    "TokenNotFoundError",
    "UserMappingError",
    "VfioError",
    "handoff",
    "iommufd",
    "kexec",
    "kho",
    "kvm",
    "session_from_fd",
    "update",
    "vfio",
]

# The modules that define the names, except those of errors, which are in pyluo.errors. A name is
# imported when it is first used: importing all of them takes a quarter of a second after every jump
# of an emulated guest, and pytest imports this package in every run of a project that has pyluo
# installed.
_HOMES = {
    "Entry": "stores.entry",
    "HolderProcess": "keepers.holder",
    "IncomingStore": "stores.incoming",
    "Keeper": "keepers.keeper",
    "KeeperChoice": "keepers.keeper",
    "NewEntry": "stores.entry",
    "OutgoingStore": "stores.outgoing",
    "ServiceManager": "keepers.service_manager",
    "GuestRam": "guest_ram",
    "IncomingSession": "session",
    "IoasLayout": "iommu_layout",
    "LiveUpdate": "liveupdate",
    "Memfd": "memfd",
    "NumaMode": "numa",
    "NumaPolicy": "numa",
    "OutgoingSession": "session",
    "OwnedFd": "descriptor",
    "Seal": "memfd",
    "StateFormat": "state_format",
    "session_from_fd": "session",
}
_MODULES = ("handoff", "iommufd", "kexec", "kho", "kvm", "network", "update", "vfio")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    is_error = name in __all__ and name.endswith("Error")
    home = "errors" if is_error else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
