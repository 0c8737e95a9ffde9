"""Open a dump of a guest's memory with drgn, which `pip install 'pyluo[drgn]'` installs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    import drgn

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["open_vmcore"]


def open_vmcore(path: str | os.PathLike[str], kernel: Kernel) -> drgn.Program:
    """Open a dump with drgn, load the kernel's types and symbols, and return drgn's program.

    Args:
        path: the path of a dump that `VM.dump` wrote, or that a GuestCrash names.
        kernel: the kernel that ran in the guest; it must have debug information, as the kernel
            `debug` has.

    Raises:
        HarnessError: drgn is not installed, the kernel has no debug information, or another kernel
            ran in the guest.
    """
    try:
        import drgn
    except ModuleNotFoundError:
        raise HarnessError("drgn is not installed", "pip install 'pyluo[drgn]'") from None
    if kernel.vmlinux is None:
        raise HarnessError(
            f"no vmlinux of {kernel.name} is known",
            "let pyluo build the kernel: name one of kernels.toml, or the path of its tree",
        )
    program = drgn.Program()
    try:
        program.set_core_dump(os.fspath(path))
        program.load_debug_info([os.fspath(kernel.vmlinux)])
    except (ValueError, OSError, drgn.MissingDebugInfoError) as error:
        raise HarnessError(
            f"drgn cannot open {os.fspath(path)} with {kernel.vmlinux} ({error})",
            "use a kernel with CONFIG_FW_CFG_SYSFS and debug information, such as `debug`",
        ) from error
    return program
