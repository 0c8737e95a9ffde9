"""The next kernel: load an image, and jump into it.

Only kexec_file_load(2) is used. The older kexec_load(2) jumps just as well and hands nothing over.
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
# Tells a later process, on this boot, by which system call the image was loaded: the kernel does
# not say.
_RECORD = "/run/pyluo/image"


def load(
    kernel: str | os.PathLike[str],
    *,
    initrd: str | os.PathLike[str] | None = None,
    cmdline: str | None = None,
    reuse_cmdline: bool = False,
    handover: bool = True,
) -> None:
    """Loads the image to jump into, in place of one that was loaded before.

    Sessions may be created and filled before or after it.

    Args:
        kernel: a bzImage built with CONFIG_RELOCATABLE=y.
        initrd: its initial ramdisk, if it needs one.
        cmdline: its command line; it needs ``kho=on liveupdate=on``, unless its configuration
            turns KHO on.
        reuse_cmdline: use the command line of the running kernel.
        handover: refuse a command line with which the next kernel would take nothing over, where
            the running one can live-update.

    Raises:
        HandoverError: EINVAL, refused by pyluo: ``liveupdate=on`` is missing, or KHO is off.
        ValueError: not exactly one of `cmdline` and `reuse_cmdline` was given.
        ImageRejectedError: ENOEXEC, not an image that the kernel can load.
        LuoPermissionError: EPERM, no CAP_SYS_BOOT, or kexec_load_disabled is 1.
        KexecBusyError: EBUSY.
        KernelTooOldError: ENOSYS, the kernel lacks CONFIG_KEXEC_FILE.
        LuoError: ENOENT and others, on opening the files; ENOMEM; EADDRNOTAVAIL, no room for it.

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
    """Whether there is an image to jump into, by whichever system call it was loaded.

    Raises:
        FileNotFoundError: the kernel was built without kexec.
    """
    return _read_file(_LOADED) == "1"


def unload() -> None:
    """Drops the loaded image, if there is one.

    Raises:
        LuoPermissionError: EPERM.
        KexecBusyError: EBUSY.

    Source: include/uapi/linux/kexec.h, KEXEC_FILE_UNLOAD. Linux 3.17.
    """
    kexec_file_load(-1, -1, b"", _UNLOAD, "")
    with suppress(OSError):
        os.unlink(_RECORD)


def reboot(*, sync: bool = True, trust_image: bool = False) -> None:
    """Jumps into the loaded image, at once and without ending any process.

    It returns only by an error. Outgoing sessions whose descriptors are open go over; everything
    else in memory is gone.

    Args:
        sync: write dirty file data to disk first; the kernel does not.
        trust_image: jump into an image that pyluo did not load on this boot, and that may have
            been loaded by kexec_load(2), on a kernel that has it.

    Raises:
        NoImageLoadedError: EINVAL; nothing was touched.
        HandoverError: EPERM, refused by pyluo: it cannot be told whether the image takes over
            what is preserved. One put in the place of pyluo's own later is not noticed.
        FileNotFoundError: the kernel was built without kexec.
        LuoPermissionError: EPERM.
        KexecBusyError: EBUSY.
        LuoError: a file could not be frozen; the system runs on with its sessions intact.

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
    """Refuses a command line that turns live update off, or does not turn it on."""
    words = line.split()
    if not is_switched_on("kho", words, default=True):
        how = "It turns KHO off"
    elif not is_switched_on("liveupdate", words, default=False):
        how = "It lacks liveupdate=on"
    else:
        return
    raise HandoverError(
        errno.EINVAL,
        "kexec_file_load",
        f"command line {line!r}",
        f"{how}: the next kernel would take nothing over, and what is preserved would be lost; add "
        f"kho=on liveupdate=on, or load it with handover=False",
    )


def _record_load() -> None:
    """Leaves word for `reboot` that the image is ours; where it cannot, `reboot` will ask."""
    with suppress(OSError):
        os.makedirs(os.path.dirname(_RECORD), mode=0o700, exist_ok=True)
        with open(_RECORD, "w") as file:
            file.write(_read_file(_BOOT_ID))


def _was_loaded_by_file() -> bool:
    """Whether the image was loaded by kexec_file_load(2), as far as that can be told."""
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
