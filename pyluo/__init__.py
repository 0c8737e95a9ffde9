"""Python bindings for the kernel's Live Update Orchestrator. Importing it opens nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo import kexec
from pyluo.descriptor import OwnedFd
from pyluo.errors import (
    AlreadyPreservedError,
    DeviceBusyError,
    FdStoreError,
    HandoverError,
    ImageRejectedError,
    IncomingStateError,
    KernelTooOldError,
    KexecBusyError,
    LiveUpdateUnavailableError,
    LuoError,
    LuoPermissionError,
    NoImageLoadedError,
    NotPreservableError,
    PreservedMemoryError,
    SealedError,
    SessionExistsError,
    SessionNameError,
    SessionNotFoundError,
    SessionRetrievedError,
    TokenInUseError,
    TokenNotFoundError,
    WrongSessionError,
)
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd, Seal
from pyluo.session import IncomingSession, OutgoingSession, session_from_fd

__all__ = [
    "AlreadyPreservedError",
    "DeviceBusyError",
    "FdStore",
    "FdStoreError",
    "HandoverError",
    "ImageRejectedError",
    "IncomingSession",
    "IncomingStateError",
    "KernelTooOldError",
    "KexecBusyError",
    "LiveUpdate",
    "LiveUpdateUnavailableError",
    "LuoError",
    "LuoPermissionError",
    "Memfd",
    "NoImageLoadedError",
    "NotPreservableError",
    "OutgoingSession",
    "OwnedFd",
    "PreservedMemoryError",
    "Seal",
    "SealedError",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "SessionRetrievedError",
    "TokenInUseError",
    "TokenNotFoundError",
    "WrongSessionError",
    "kexec",
    "kho",
    "session_from_fd",
]

if TYPE_CHECKING:
    from pyluo import kho
    from pyluo.fdstore import FdStore

# Loaded when they are asked for: what they need is a tenth of a second of a guest's every jump.
_LATER = {"kho": "pyluo.kho", "FdStore": "pyluo.fdstore"}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_LATER[name])
    return getattr(module, name, module)
