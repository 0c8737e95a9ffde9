"""Opens a dump of a guest's memory with drgn, which `pyluo[drgn]` brings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    import drgn

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["open_vmcore"]


def open_vmcore(path: str | os.PathLike[str], kernel: Kernel) -> drgn.Program:
    """A dump as a program that drgn looks into, with the kernel's types and symbols.

    Args:
        path: of a file that `VM.dump` wrote, or that a GuestCrash names.
        kernel: that ran; it has to have debug information, as `debug` does.

    Raises:
        HarnessError: drgn is not installed, the kernel lacks debug information, or it is another
            one than ran.
    """
    try:
        import drgn
    except ModuleNotFoundError:
        raise HarnessError("drgn is not installed", "pip install 'pyluo[drgn]'") from None
    if kernel.vmlinux is None:
        raise HarnessError(
            f"of {kernel.name} there is only the image", "build it: see kernels.toml"
        )
    program = drgn.Program()
    try:
        program.set_core_dump(os.fspath(path))
        program.load_debug_info([os.fspath(kernel.vmlinux)])
    except (ValueError, OSError, drgn.MissingDebugInfoError) as error:
        raise HarnessError(
            f"drgn does not open {os.fspath(path)} with {kernel.vmlinux} ({error})",
            "take a kernel with CONFIG_FW_CFG_SYSFS and debug information, such as `debug`",
        ) from error
    return program
