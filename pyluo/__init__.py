"""Python bindings for the kernel's Live Update Orchestrator. Importing it opens nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo import kexec
from pyluo.descriptor import OwnedFd
from pyluo.errors import (
    AlreadyPreservedError,
    DeviceBusyError,
    ImageRejectedError,
    IncomingStateError,
    KernelTooOldError,
    KexecBusyError,
    LiveUpdateUnavailableError,
    LuoError,
    LuoPermissionError,
    NoImageLoadedError,
    NotPreservableError,
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
from pyluo.session import IncomingSession, OutgoingSession

__all__ = [
    "AlreadyPreservedError",
    "DeviceBusyError",
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
]

if TYPE_CHECKING:
    from types import ModuleType

    from pyluo import kho


def __getattr__(name: str) -> ModuleType:
    # Loaded when it is asked for: what it needs is a tenth of a second of a guest's every jump.
    if name == "kho":
        from importlib import import_module

        return import_module("pyluo.kho")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
