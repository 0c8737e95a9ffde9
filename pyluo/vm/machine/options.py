"""The options of a guest, which the command lines of `pyluo vm` and pytest share.

The option ``--memory`` of `pyluo vm` is ``--pyluo-memory`` in pytest, and so on.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.vm import VM

__all__ = ["GuestOptions", "add", "count", "seconds", "size"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text: str) -> int:
    """Return the size in bytes that a text means: a number, and K, M, G or nothing after it."""
    match = re.fullmatch(r"([1-9]\d*)([KMG]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512M or 2G, for example")
    return int(match[1]) * _UNITS[match[2]]


def count(text: str) -> int:
    """Return the whole number of at least 1 that a text means."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """Return the number of seconds, greater than 0, that a text means."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return float(text)


# The keyword arguments of each option, for argparse's add_argument and pytest's addoption.
_OPTIONS: dict[str, dict[str, Any]] = {
    "kernel": {
        "default": "stable",
        "metavar": "KERNEL",
        "help": "the kernel to boot: a name in kernels.toml, or the path of a bzImage, a kernel "
        "tree or a tarball of one (default: stable)",
    },
    "to": {
        "metavar": "KERNEL",
        "help": "the kernel to live-update to, and back again if there are several hops (default: "
        "the kernel that is booted)",
    },
    "config": {
        "action": "append",
        "default": [],
        "metavar": "FILE|CONFIG_X=V",
        "help": "a Kconfig fragment, or a line of one, for kernels that pyluo builds; may be "
        "repeated",
    },
    "memory": {
        "type": size,
        "metavar": "SIZE",
        "help": "memory of a guest (default: 1G; 2G for a kernel with KASAN)",
    },
    "cpus": {"type": count, "default": 1, "metavar": "N", "help": "CPUs of a guest (default: 1)"},
    "device": {
        "action": "append",
        "default": [],
        "metavar": "DEVICE",
        "help": "a further -device of QEMU; may be repeated",
    },
    "network": {
        "action": "store_true",
        "help": "give guests a network interface, and bring it and the loopback up",
    },
    "root": {
        "metavar": "ROOT",
        "help": "another root for guests than the host's: a name in roots.toml, or the path of a "
        "folder with an operating system; its systemd is the first process",
    },
    "accel": {
        "choices": ["kvm", "tcg"],
        "help": "what runs the guest (default: kvm if it works, else tcg)",
    },
    "append": {
        "default": "",
        "metavar": "TEXT",
        "help": "more words for the kernel's command line",
    },
    "boot-timeout": {
        "type": seconds,
        "metavar": "S",
        "help": "seconds within which a guest must be up, after the boot and after each jump "
        "(default: 60; 360 for a kernel with KASAN; three times as long with another root)",
    },
    "vmcores": {
        "metavar": "DIR",
        "help": "the folder to write the memory of guests that die to (default: $PYLUO_VMCORES)",
    },
}


def add(
    add_option: Callable[..., object],
    prefix: str = "",
    *,
    only: Container[str] = tuple(_OPTIONS),
    without: Container[str] = (),
) -> None:
    """Add the options of a guest to a parser.

    Args:
        add_option: argparse's `add_argument`, or pytest's `addoption`.
        prefix: the text before each option's name.
        only: the names of the options to add.
        without: the names of options to leave out.
    """
    for name, keywords in _OPTIONS.items():
        if name in only and name not in without:
            add_option(f"--{prefix}{name}", **keywords)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """The values of the options of a guest on a command line.

    Attributes:
        kernel: the kernel to boot; None if the command chooses it.
        to: the kernel to live-update to; None for the kernel that is booted.
        config: Kconfig fragments, and lines of fragments, for kernels that pyluo builds.
        memory: the memory in bytes; None for the memory that the kernel needs.
        cpus: the number of CPUs.
        device: values of further ``-device`` options.
        network: whether the guest has a network interface.
        root: the name or the path of the root; None for the host's.
        accel: kvm or tcg; None for KVM if it works.
        append: more words for the kernel's command line.
        boot_timeout: seconds after a boot or a jump within which the guest must have spoken; None
            for the time that the kernel needs.
        vmcores: the folder for the memory of guests that die; None for $PYLUO_VMCORES.
    """

    kernel: str | None
    to: str | None
    config: tuple[str, ...]
    memory: int | None
    cpus: int
    device: tuple[str, ...]
    network: bool
    root: str | None
    accel: str | None
    append: str
    boot_timeout: float | None
    vmcores: str | None

    @classmethod
    def of(cls, parsed: argparse.Namespace, prefix: str = "") -> GuestOptions:
        """Return the options of a guest from the result of a parser.

        Args:
            parsed: the result of the parser.
            prefix: the prefix that `add` was given, with underscores for dashes.
        """
        values: dict[str, Any] = {}
        for name in cls.__slots__:
            value = getattr(parsed, prefix + name, None)
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def words(self, prefix: str) -> list[str]:
        """Return the options as arguments of a command line.

        Args:
            prefix: the text before each option's name, including the first dashes.
        """
        words = []
        for name in _OPTIONS:
            value = getattr(self, name.replace("-", "_"))
            if value is True:
                words.append(prefix + name)
            elif isinstance(value, tuple):
                words += [f"{prefix}{name}={each}" for each in value]
            elif value not in (None, False, ""):
                words.append(f"{prefix}{name}={value}")
        return words

    def find_kernel(self) -> Kernel:
        """Return the kernel to boot, and build it first if it is not in the cache.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built.
        """
        assert self.kernel is not None
        return self.find(self.kernel, self.to)

    def find_next(self) -> Kernel | None:
        """Return the kernel to live-update to, and build it first if it is not in the cache.

        The result is None if that is the kernel that is booted.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built.
        """
        return None if self.to is None else self.find(self.to, self.kernel)

    def find(self, what: str, *others: str | None) -> Kernel:
        """Return a kernel for the guest, and build it first if it is not in the cache.

        Args:
            what: the name or the path of the kernel.
            others: the names or paths of the guest's other kernels. `config` cannot change a
                bzImage. It is ignored for a bzImage if one of the other kernels is no bzImage,
                because it is meant for that kernel then; otherwise it is an error.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built.
        """
        from pyluo.vm.kernels.kernel import Kernel, is_image

        is_for_another = is_image(what) and not all(map(is_image, filter(None, others)))
        return Kernel.find(what, config=() if is_for_another else self.config)

    def guest(self, kernel: Kernel | None = None, to: Kernel | None = None, **more: Any) -> VM:
        """Return a guest that is not booted yet.

        Args:
            kernel: the kernel to boot; if None, this and `to` are those that the options name.
            to: the kernel to live-update to; None for `kernel`.
            more: further arguments of `VM`.
        """
        from pyluo.vm.machine.accelerator import Accelerator
        from pyluo.vm.machine.vm import VM

        if kernel is None:
            kernel, to = self.find_kernel(), self.find_next()
        return VM(
            kernel,
            to=to,
            memory=self.memory,
            cpus=self.cpus,
            devices=self.device,
            append=self.append,
            network=self.network,
            root=self.root,
            accelerator=Accelerator(self.accel) if self.accel else None,
            boot_timeout=self.boot_timeout,
            vmcores=self.vmcores,
            **more,
        )
