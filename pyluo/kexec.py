"""Loading the image of the next kernel, and jumping into it.

This module uses only kexec_file_load(2). A kernel loaded by the older kexec_load(2) takes nothing
over from this one.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from pyluo._sys import constant, kexec_file_load, kexec_load_exists, raising
from pyluo._sys import reboot as leave_kernel
from pyluo.cmdline import is_switched_on
from pyluo.errors import HandoverError, NoImageLoadedError
from pyluo.liveupdate import DEVICE

__all__ = ["load", "loaded", "reboot", "unload"]

_UNLOAD = constant("KEXEC_FILE_UNLOAD")
_NO_INITRAMFS = constant("KEXEC_FILE_NO_INITRAMFS")
_REBOOT_KEXEC = constant("LINUX_REBOOT_CMD_KEXEC")
_LOADED = "/sys/kernel/kexec_loaded"
_CMDLINE = "/proc/cmdline"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# This file tells a later process that pyluo loaded the image since this kernel booted. The kernel
# does not report which system call loaded an image.
_RECORD = "/run/pyluo/image"


def load(
    kernel: str | os.PathLike[str],
    *,
    initrd: str | os.PathLike[str] | None = None,
    cmdline: str | None = None,
    reuse_cmdline: bool = False,
    handover: bool = True,
) -> None:
    """Load the image of the next kernel, in place of an image that was loaded before.

    Sessions may be created and filled before or after the image is loaded.

    Args:
        kernel: the path of a bzImage built with CONFIG_RELOCATABLE=y.
        initrd: the path of the initial ramdisk, if the kernel needs one.
        cmdline: the kernel's command line; it needs ``liveupdate=on``, and ``kho=on`` unless the
            kernel's configuration turns KHO on.
        reuse_cmdline: whether to use the command line of the running kernel.
        handover: whether to refuse a command line with which the next kernel would take nothing
            over. This is checked only if the running kernel has live update.

    Raises:
        HandoverError: pyluo refuses because ``liveupdate=on`` is missing or KHO is off (EINVAL).
        ValueError: not exactly one of `cmdline` and `reuse_cmdline` was given.
        ImageRejectedError: the kernel cannot load this kind of image (ENOEXEC).
        LuoPermissionError: the caller lacks CAP_SYS_BOOT, or kexec_load_disabled is 1 (EPERM).
        KexecBusyError: another kexec operation is running (EBUSY).
        KernelTooOldError: the kernel lacks CONFIG_KEXEC_FILE (ENOSYS).
        LuoError: a file cannot be opened (ENOENT and others); there is no memory (ENOMEM), or no
            range of addresses for the image (EADDRNOTAVAIL).

    Source: kexec_file_load(2); include/uapi/linux/kexec.h, KEXEC_FILE_*. Linux 3.17.
    """
    if reuse_cmdline == (cmdline is not None):
        raise ValueError("give either a command line or reuse_cmdline=True")
    line = _read_file(_CMDLINE) if cmdline is None else cmdline
    if handover and os.path.exists(DEVICE):
        _check_handover(line)
    kernel_fd = _open(kernel)
    initrd_fd = -1
    try:
        if initrd is not None:
            initrd_fd = _open(initrd)
        flags = _NO_INITRAMFS if initrd is None else 0
        subject = f"image {os.fspath(kernel)}"
        kexec_file_load(kernel_fd, initrd_fd, os.fsencode(line), flags, subject)
        _record_load()
    finally:
        os.close(kernel_fd)
        if initrd_fd >= 0:
            os.close(initrd_fd)


def loaded() -> bool:
    """Return whether an image is loaded, by kexec_file_load(2) or by kexec_load(2).

    Raises:
        FileNotFoundError: the kernel was built without kexec.
    """
    return _read_file(_LOADED) == "1"


def unload() -> None:
    """Unload the image, if one is loaded.

    Raises:
        LuoPermissionError: the caller lacks CAP_SYS_BOOT (EPERM).
        KexecBusyError: another kexec operation is running (EBUSY).

    Source: include/uapi/linux/kexec.h, KEXEC_FILE_UNLOAD. Linux 3.17.
    """
    kexec_file_load(-1, -1, b"", _UNLOAD, "")
    with suppress(OSError):
        os.unlink(_RECORD)


def reboot(*, sync: bool = True, trust_image: bool = False) -> None:
    """Jump into the loaded image immediately, without ending any process first.

    If the jump succeeds, this call does not return; if it fails, the call raises. Outgoing sessions
    whose descriptors are open are carried over; everything else in memory is lost.

    Args:
        sync: whether to write dirty file data to disk first, which the kernel does not do.
        trust_image: whether to jump even if the image may have been loaded by kexec_load(2). It may
            have been if this kernel has that system call, and pyluo has recorded no load since this
            kernel booted.

    Raises:
        NoImageLoadedError: no image is loaded (EINVAL); nothing was changed.
        HandoverError: pyluo refuses because the image may take nothing over (EPERM). pyluo does not
            notice if another program has replaced the image that pyluo loaded.
        FileNotFoundError: the kernel was built without kexec.
        LuoPermissionError: the caller lacks CAP_SYS_BOOT (EPERM).
        KexecBusyError: another kexec operation is running (EBUSY).
        LuoError: a preserved file could not be frozen; the system keeps running, and its sessions
            are intact.

    Source: reboot(2); include/uapi/linux/reboot.h, LINUX_REBOOT_CMD_KEXEC. Linux 2.6.13.
    """
    if not loaded():
        raise NoImageLoadedError(errno.EINVAL, "reboot", "this system")
    if not trust_image and os.path.exists(DEVICE) and not _was_loaded_by_file():
        raise HandoverError(
            errno.EPERM,
            "reboot",
            "the loaded image",
            "pyluo did not load it on this boot, and an image loaded by kexec_load(2) takes "
            "nothing over: load it with kexec.load(), or jump with trust_image=True",
        )
    if sync:
        os.sync()
    leave_kernel(_REBOOT_KEXEC)


def _check_handover(line: str) -> None:
    """Refuse a command line without live update, or with KHO turned off."""
    words = line.split()
    if not is_switched_on("kho", words, default=True):
        reason = "It turns KHO off"
    elif not is_switched_on("liveupdate", words, default=False):
        reason = "It lacks liveupdate=on"
    else:
        return
    raise HandoverError(
        errno.EINVAL,
        "kexec_file_load",
        f"command line {line!r}",
        f"{reason}: the next kernel would take nothing over, and what is preserved would be lost; "
        f"add kho=on liveupdate=on, or load it with handover=False",
    )


def _record_load() -> None:
    """Write the file that tells `reboot` that pyluo loaded the image.

    If the file cannot be written, `reboot` may refuse the image; that is not an error here.
    """
    with suppress(OSError):
        os.makedirs(os.path.dirname(_RECORD), mode=0o700, exist_ok=True)
        with open(_RECORD, "w") as file:
            file.write(_read_file(_BOOT_ID))


def _was_loaded_by_file() -> bool:
    """Return whether it is certain that kexec_file_load(2) loaded the image.

    It is certain if pyluo recorded the load, or if this kernel has no other such system call.
    """
    with suppress(OSError):
        if _read_file(_RECORD) == _read_file(_BOOT_ID):
            return True
    return not kexec_load_exists()


def _open(path: str | os.PathLike[str]) -> int:
    with raising("open image", os.fspath(path)):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read_file(path: str) -> str:
    with open(path, errors="surrogateescape") as file:
        return file.read().rstrip("\n")
