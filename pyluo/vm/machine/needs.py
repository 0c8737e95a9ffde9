"""What a kernel needs because of its configuration, and what the harness needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["PLAIN", "Needs", "check_options", "explain_root", "needs"]


@dataclass(frozen=True, slots=True)
class Needs:
    """Default settings of a guest.

    Attributes:
        memory: the size of the memory in bytes.
        boot_timeout: seconds after a boot or a jump within which the guest must have spoken.
        words: words for the kernel's command line, before those of the user.
    """

    memory: int
    boot_timeout: float
    words: str = ""


PLAIN = Needs(memory=1 << 30, boot_timeout=60.0)
_SANITIZED = Needs(
    # KASAN's shadow takes an eighth of the memory, and KHO's scratch areas must hold the shadow of
    # the next kernel. There are two scratch areas, and kho_scratch= sets a factor s. Without
    # CONFIG_NUMA, and if the kernel allocates A bytes while it boots, the first area has s * A
    # bytes and the second s * (A + s * A). With the default of 200 % both have 8 * A bytes: no
    # guest of 1, 2 or 4 GiB has room for that, and KHO switches itself off. With 75 % they have
    # about 2 * A bytes. With 100 % in 2 GiB, one cold boot in twelve found no room, depending on
    # where KASLR had put the kernel.
    memory=2 << 30,
    # Under TCG a boot with KASAN takes six times as long as one without.
    boot_timeout=6 * PLAIN.boot_timeout,
    # no5lvl: with five page-table levels, KASAN takes every access for an invalid one for as long
    # as identify_cpu() has the processor's features cleared, and so it reports any timer interrupt
    # at that time.
    words="kho_scratch=75% no5lvl",
)


def needs(kernel: Kernel) -> Needs:
    """Return what a kernel needs; a kernel whose configuration is not known gets the defaults."""
    return _SANITIZED if kernel.has("CONFIG_KASAN") else PLAIN


# Without one of these, built in, the guest cannot mount the host's files, run its first process or
# reach the host.
_ROOT = ("CONFIG_VIRTIO_PCI", "CONFIG_NET_9P_VIRTIO", "CONFIG_9P_FS")
_OPTIONS = (
    *_ROOT, "CONFIG_SERIAL_8250_CONSOLE", "CONFIG_VIRTIO_CONSOLE", "CONFIG_BINFMT_ELF",
    "CONFIG_DEVTMPFS_MOUNT", "CONFIG_PROC_FS", "CONFIG_SYSFS", "CONFIG_TMPFS",
    "CONFIG_UNIX98_PTYS",
)  # fmt: skip
_NETWORK = ("CONFIG_VIRTIO_NET",)
_OVERLAY = ("CONFIG_OVERLAY_FS",)
_OVERLAID = ("/tmp/", "/var/tmp/")  # see `pyluo.guest.mounts`
_NO_ROOT = ("VFS: Cannot open root device", "VFS: Unable to mount root fs")


def check_options(
    kernel: Kernel, *, network: bool, folders: Sequence[str] = (), more: Sequence[str] = ()
) -> None:
    """Check that a kernel can run a guest; nothing is known if its configuration is not known.

    Args:
        kernel: the kernel.
        network: whether the guest has a network interface.
        folders: the folders from which the guest imports modules. Without overlayfs, the guest's
            own /tmp hides those of the host in it.
        more: further options that the guest needs.

    Raises:
        HarnessError: the kernel lacks options, or has them as modules.
    """
    if kernel.config is None:
        return
    hidden = any(f"{folder}/".startswith(_OVERLAID) for folder in folders)
    wanted = [*_OPTIONS, *more, *(_NETWORK if network else ()), *(_OVERLAY if hidden else ())]
    if missing := [option for option in wanted if not kernel.has(option)]:
        raise HarnessError(
            f"the kernel {kernel.name} cannot run a guest: it lacks {', '.join(missing)}",
            "a guest has no initramfs and loads no modules: build the kernel with these set to y",
        )


def explain_root(kernel: Kernel, console: str) -> HarnessError | None:
    """Return the error for a kernel that could not mount the host's files.

    The result is None if it could, or if its configuration is known: `check_options` has found
    nothing missing then, and the kernel is to blame.

    Args:
        kernel: the kernel.
        console: the text of the console.
    """
    if kernel.config is not None or not any(words in console for words in _NO_ROOT):
        return None
    return HarnessError(
        f"the kernel {kernel.name} cannot mount the host's files as its root",
        f"a guest has no initramfs and loads no modules: build the kernel with {', '.join(_ROOT)} "
        f"set to y",
    )
