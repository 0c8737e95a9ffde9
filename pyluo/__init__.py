"""Python bindings for the kernel's Live Update Orchestrator. Importing it opens nothing."""

from __future__ import annotations

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
]
