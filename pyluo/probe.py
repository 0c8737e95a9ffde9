"""Probing which kinds of file the running kernel can preserve.

`probe` tries to preserve a file of each kind in a new session, and then discards the session.
"""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, PlainIoctl
from pyluo.descriptor import OwnedFd
from pyluo.errors import NotPreservableError, PreservedMemoryError, RequestError
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd, Seal, supports_seals

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.session import OutgoingSession

__all__ = ["Finding", "Verdict", "probe"]

_MIB = 1 << 20
_CREATE_VM = PlainIoctl("KVM_CREATE_VM", RequestError)
_CREATE_GUEST_MEMFD = Ioctl("KVM_CREATE_GUEST_MEMFD", "kvm_create_guest_memfd", RequestError)


class Verdict(enum.Enum):
    """Whether the kernel preserved a file of some kind."""

    PRESERVED = "preserved"
    """The kernel preserved the file."""
    REFUSED = "refused"
    """The kernel refused to preserve the file."""
    ABSENT = "absent"
    """No file of this kind could be created or opened on this system, so nothing was tried."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one kind of file.

    Attributes:
        kind: the name of the kind, as in the manual.
        verdict: whether the file was preserved.
        errno: the error that preserving or creating the file gave; 0 if the file was preserved.
        reason: why the file was refused or could not be created; for a kind that is preserved but
            changed, a warning; otherwise an empty string.
    """

    kind: str
    verdict: Verdict
    errno: int
    reason: str


def probe(device: LiveUpdate | None = None) -> list[Finding]:
    """Try to preserve a file of each kind; return one finding for each kind.

    Args:
        device: the open device; by default the call opens and closes the device itself.

    Raises:
        RequestError: see `LiveUpdate` and `LiveUpdate.create_session`.

    Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_SESSION_PRESERVE_FD; of the kinds:
    memfd_create(2), eventfd(2), include/uapi/linux/kvm.h, KVM_CREATE_VM and KVM_CREATE_GUEST_MEMFD.
    Linux 6.19.
    """
    if device is None:
        with LiveUpdate() as opened:
            return probe(opened)
    session = device.create_session(f"pyluo probe {os.getpid()}")
    try:
        return [_try_to_preserve(session, token, kind) for token, kind in enumerate(_KINDS)]
    finally:
        session.discard()


def _try_to_preserve(session: OutgoingSession, token: int, kind: str) -> Finding:
    """Create a file of a kind, and try to preserve it; return the result."""
    try:
        file = _KINDS[kind]()
    except OSError as error:
        reason = getattr(error, "hint", "") or error.strerror or str(error)
        return Finding(kind, Verdict.ABSENT, error.errno or 0, reason)
    with file:
        try:
            session.preserve(file, token, allow_noexec=True)
        except NotPreservableError as error:
            unsupported = error.errno == errno.ENOENT
            reason = "the kernel has no live update support for it" if unsupported else error.hint
            return Finding(kind, Verdict.REFUSED, error.errno or 0, reason)
        except PreservedMemoryError:
            raise  # pyluo refused for lack of memory, which says nothing about the kernel
        except RequestError as error:
            return Finding(kind, Verdict.REFUSED, error.errno or 0, str(error))
    return Finding(kind, Verdict.PRESERVED, 0, _CAVEATS.get(kind, ""))


def _make_memfd() -> OwnedFd:
    return Memfd.create("probe", 4096)


def _make_sealed_memfd() -> OwnedFd:
    return Memfd.create("probe", 4096, seals=Seal.SHRINK | Seal.GROW | Seal.WRITE | Seal.SEAL)


def _make_noexec_memfd() -> OwnedFd:
    return Memfd.create("probe", 4096, executable=False)


def _huge_memfd_maker(size: int) -> Callable[[], OwnedFd]:
    return lambda: Memfd.create("probe", size, huge_page_size=size)


def _make_unnamed_file() -> OwnedFd:
    """Create an unnamed file in the first of the usual folders that is a tmpfs."""
    for folder in ("/dev/shm", "/run", "/tmp"):
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        file = OwnedFd(fd)
        if supports_seals(fd):  # the folder is on a tmpfs
            os.ftruncate(fd, 4096)
            return file
        file.close()
    raise OSError(errno.ENOENT, "no tmpfs at /dev/shm, /run or /tmp")


def _make_eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))


def _open(path: str) -> OwnedFd:
    return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def _open_vfio_device() -> OwnedFd:
    devices = sorted(Path("/dev/vfio/devices").glob("vfio*"))
    if not devices:
        raise OSError(errno.ENODEV, "no device is bound to a VFIO driver")
    return _open(os.fspath(devices[0]))


def _make_vm() -> OwnedFd:
    with _open("/dev/kvm") as kvm:
        return OwnedFd(_CREATE_VM(kvm.fileno()))


def _make_guest_memfd() -> OwnedFd:
    with _make_vm() as machine:
        return OwnedFd(_CREATE_GUEST_MEMFD(machine.fileno(), "a VM", size=4096).result)


_KINDS: dict[str, Callable[[], OwnedFd]] = {
    "memfd": _make_memfd,
    "memfd, sealed": _make_sealed_memfd,
    "memfd, noexec": _make_noexec_memfd,
    "memfd, 2 MiB huge pages": _huge_memfd_maker(2 * _MIB),
    "memfd, 1 GiB huge pages": _huge_memfd_maker(1024 * _MIB),
    "unnamed file of a tmpfs": _make_unnamed_file,
    "eventfd": _make_eventfd,
    "iommufd": lambda: _open("/dev/iommu"),
    "VFIO device": _open_vfio_device,
    "KVM VM": _make_vm,
    "guest_memfd": _make_guest_memfd,
}

_CAVEATS = {
    "memfd, noexec": (
        "it comes back executable and sealed against writing on the kernels up to 7.3, so pyluo "
        "refuses it unless told otherwise"
    ),
}
