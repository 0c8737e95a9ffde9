"""Jumping into the image that is loaded."""

from __future__ import annotations

import errno
import os

from pyluo._sys import constant
from pyluo._sys import reboot as leave_kernel
from pyluo.errors import HandoverError, KexecError
from pyluo.kexec.loading import loaded
from pyluo.kexec.record import is_loaded_by_file
from pyluo.liveupdate import DEVICE

__all__ = ["reboot"]

_REBOOT_KEXEC = constant("LINUX_REBOOT_CMD_KEXEC")


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
        KexecError: no image is loaded, or a preserved file could not be frozen (EINVAL); the system
            keeps running, and its sessions are intact.
        HandoverError: pyluo refuses because the image may take nothing over (EPERM). pyluo does not
            notice if another program has replaced the image that pyluo loaded.
        FileNotFoundError: the kernel was built without kexec.
        NotPermittedError: the caller lacks CAP_SYS_BOOT (EPERM).
        KexecBusyError: another kexec operation is running (EBUSY).

    Source: reboot(2); include/uapi/linux/reboot.h, LINUX_REBOOT_CMD_KEXEC. Linux 2.6.13.
    """
    if not loaded():
        raise KexecError(errno.EINVAL, "reboot", "this system")
    if not trust_image and os.path.exists(DEVICE) and not is_loaded_by_file():
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
