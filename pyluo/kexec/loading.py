"""Loading the image of the next kernel with kexec_file_load(2)."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass

from pyluo._sys import constant, kexec_file_load
from pyluo.build_config import BuildConfig
from pyluo.errors import ImageRejectedError, ImageSignatureError, NotPermittedError
from pyluo.kexec import record
from pyluo.kexec.command_line import append, check_length, drop_repeats, strip_built_in
from pyluo.kexec.image import OPEN_IMAGE, READ_IMAGE, OpenImage
from pyluo.liveupdate import DEVICE

__all__ = ["LoadedImage", "load", "loaded", "unload"]

_UNLOAD = constant("KEXEC_FILE_UNLOAD")
_NO_INITRAMFS = constant("KEXEC_FILE_NO_INITRAMFS")
_LOADED = "/sys/kernel/kexec_loaded"
_CMDLINE = "/proc/cmdline"
_LOCKDOWN = "/sys/kernel/security/lockdown"
_DISABLED = "/proc/sys/kernel/kexec_load_disabled"
_CAP_SYS_BOOT = 22


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """The image of the next kernel, as it was loaded.

    Attributes:
        release: the release of the next kernel; empty if the image does not say.
        cmdline: the command line that the next kernel was given.
        wrappers: what the image was unwrapped from, in words, the outermost first.
        unknown: what could not be told about the handover to this image, as sentences.
    """

    release: str
    cmdline: str
    wrappers: tuple[str, ...]
    unknown: tuple[str, ...]


def load(
    kernel: str | os.PathLike[str],
    *,
    initrd: str | os.PathLike[str] | None = None,
    cmdline: str | None = None,
    reuse_cmdline: bool = False,
    handover: bool = True,
) -> LoadedImage:
    """Load the image of the next kernel, in place of an image that was loaded before.

    Sessions may be created and filled before or after the image is loaded. If the call fails, they
    stay as they are, and so does an image that was loaded before.

    An image that is compressed by gzip, bzip2, lzma, xz, lz4 or zstd, an EFI zboot image and a
    unified kernel image (UKI) are unwrapped to memory. The kernel sees only what is in them: if it
    wants signatures, the image inside needs one of its own.

    Args:
        kernel: the path of the image; on x86 a bzImage, which may be wrapped as above.
        initrd: the path of the initial ramdisk, in place of the one in a UKI.
        cmdline: the kernel's command line; it needs ``kho=on liveupdate=on``, unless the image says
            that they are built in. Without it and without `reuse_cmdline`, a UKI has its own, with
            the add-ons beside it.
        reuse_cmdline: whether to use the command line of the running kernel, without the words that
            are there twice and without what the next kernel has built in. The words of `cmdline`
            follow.
        handover: whether to refuse an image or a command line with which the next kernel would take
            nothing over. This is checked only if the running kernel has live update.

    Returns:
        What was loaded; also what could not be told.

    Raises:
        HandoverError: pyluo refuses because ``liveupdate=on`` is missing or KHO is off (EINVAL), or
            because the image has no live update, or takes over other formats (EOPNOTSUPP).
        ValueError: there is no command line.
        ImageRejectedError: the image is of a kind that cannot be loaded (ENOEXEC) or too large
            (EFBIG).
        ImageSignatureError: the image has no signature (ENODATA), one of an unknown key (ENOKEY),
            or a wrong one (EKEYREJECTED and others), and this kernel wants signatures; or this
            kernel is locked down and the image has no valid signature (EPERM).
        NotPermittedError: the caller lacks CAP_SYS_BOOT, or kexec_load_disabled is 1 (EPERM).
        KexecBusyError: another kexec operation is running (EBUSY).
        KernelTooOldError: the kernel lacks CONFIG_KEXEC_FILE (ENOSYS).
        KexecError: a file cannot be opened (ENOENT and others); the command line is too long
            (E2BIG); there is no memory (ENOMEM), or no range of addresses for the image
            (EADDRNOTAVAIL).

    Source: kexec_file_load(2); include/uapi/linux/kexec.h, KEXEC_FILE_*. Linux 3.17.
    """
    with OpenImage(kernel) as image:
        line, unknown = _choose_line(image, cmdline, reuse_cmdline, handover)
        ramdisk = image.initrd
        if initrd is not None:
            with OPEN_IMAGE.raising(os.fspath(initrd)):
                ramdisk = os.open(initrd, os.O_RDONLY | os.O_CLOEXEC)
        try:
            flags = _NO_INITRAMFS if ramdisk < 0 else 0
            _load_open(image, ramdisk, os.fsencode(line), flags)
        finally:
            if initrd is not None:
                os.close(ramdisk)
        record.write()
        release = image.header.release if image.header is not None else ""
        return LoadedImage(release, line, image.wrappers, unknown)


def loaded() -> bool:
    """Return whether an image is loaded, by kexec_file_load(2) or by kexec_load(2).

    Raises:
        FileNotFoundError: the kernel was built without kexec.
    """
    return _read_file(_LOADED) == "1"


def unload() -> None:
    """Unload the image, if one is loaded.

    Raises:
        NotPermittedError: the caller lacks CAP_SYS_BOOT (EPERM).
        KexecBusyError: another kexec operation is running (EBUSY).

    Source: include/uapi/linux/kexec.h, KEXEC_FILE_UNLOAD. Linux 3.17.
    """
    kexec_file_load(-1, -1, b"", _UNLOAD, "")
    record.remove()


def _choose_line(
    image: OpenImage, cmdline: str | None, reuse_cmdline: bool, handover: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the command line for an image, and what could not be told about the handover.

    Raises:
        HandoverError: the next kernel would take nothing over.
        ValueError: there is no command line.
        KexecError: the command line is too long (E2BIG).
    """
    is_checked = handover and os.path.exists(DEVICE)
    if cmdline is None and not reuse_cmdline and image.command_line is None:
        raise ValueError("give a command line, or reuse_cmdline=True: the image has none")
    contents, config = None, None
    unknown: tuple[str, ...] = ()
    # A look into the image takes a tenth of a second. A jump that checks nothing does without.
    if is_checked or reuse_cmdline:
        from pyluo.kexec.contents import read_contents

        with READ_IMAGE.raising(image.path):
            contents = read_contents(image)
        config = contents.config
    source = "that are built into it"
    built_in = config.command_line if config is not None else ""
    line = cmdline if cmdline is not None else image.command_line or ""
    if reuse_cmdline:
        reused = strip_built_in(_read_file(_CMDLINE), built_in)
        line = append(drop_repeats(reused), cmdline or "")
    if is_checked and contents is not None:
        from pyluo.kexec.handover import check_image, check_line

        unknown = check_image(image.subject, contents)
        check_line(line, contents)
    if config is None and contents is not None and (running := BuildConfig.running()) is not None:
        built_in = running.command_line
        source = "that are built into this kernel, and may be into the next"
    check_length(line, built_in, image.header, source)
    return line, unknown


def _load_open(image: OpenImage, ramdisk: int, line: bytes, flags: int) -> None:
    """Load an open image; tell what the kernel's refusal is about.

    Raises:
        KexecError: as `load`.
    """
    try:
        kexec_file_load(image.kernel, ramdisk, line, flags, image.subject)
    except NotPermittedError as error:
        if _is_locked_down():
            raise ImageSignatureError(
                errno.EPERM,
                error.operation,
                image.subject,
                "This kernel is locked down, and loads only images with a valid signature: see "
                f"{_LOCKDOWN} and kernel_lockdown(7). Nothing has changed, and what is preserved "
                "is intact",
            ) from None
        raise
    except ImageRejectedError as error:
        obstacle = image.header.obstacle if image.header is not None else ""
        if error.errno == errno.ENOEXEC and obstacle:
            raise image.reject(f"The kernel loads no such image: {obstacle}") from None
        raise


def _is_locked_down() -> bool:
    """Return whether lockdown is why this process may not load an image.

    Lockdown comes last: before it the kernel looks whether the process has the capability, and
    whether loading is disabled. False if that cannot be read, because securityfs is not mounted.
    """
    with suppress(OSError):
        status = _read_file("/proc/self/status").partition("\nCapEff:")[2].split()
        is_allowed = int(status[0], 16) >> _CAP_SYS_BOOT & 1 and _read_file(_DISABLED) == "0"
        # The mode is in brackets.
        return bool(is_allowed) and "[none]" not in _read_file(_LOCKDOWN)
    return False


def _read_file(path: str) -> str:
    with open(path, errors="surrogateescape") as file:
        return file.read().rstrip("\n")
