"""What is said of a guest on a command line: the same to `pyluo vm` as to pytest.

`pyluo vm` takes ``--memory``, pytest ``--pyluo-memory``, and so for each.
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
    """Bytes, from a number with K, M or G behind it or nothing."""
    match = re.fullmatch(r"([1-9]\d*)([KMG]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512M or 2G, for example")
    return int(match[1]) * _UNITS[match[2]]


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def seconds(text: str) -> float:
    """A time that is longer than nothing."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return float(text)


# What argparse's add_argument and pytest's addoption take alike.
_OPTIONS: dict[str, dict[str, Any]] = {
    "kernel": {
        "default": "stable",
        "metavar": "KERNEL",
        "help": "to boot: a name of kernels.toml, or the path of a bzImage, a kernel tree or a "
        "tarball of one (default: stable)",
    },
    "to": {
        "metavar": "KERNEL",
        "help": "to live-update to, and back again if there are several hops; without it, the "
        "one that runs",
    },
    "config": {
        "action": "append",
        "default": [],
        "metavar": "FILE|CONFIG_X=V",
        "help": "a Kconfig fragment, or a line of one, for kernels that are built; may be repeated",
    },
    "memory": {
        "type": size,
        "metavar": "SIZE",
        "help": "of a guest (default: 1G; 2G for a kernel with KASAN)",
    },
    "cpus": {"type": count, "default": 1, "metavar": "N", "help": "of a guest (default: 1)"},
    "device": {
        "action": "append",
        "default": [],
        "metavar": "DEVICE",
        "help": "a further -device of QEMU; may be repeated",
    },
    "network": {"action": "store_true", "help": "give guests an interface, up like the loopback"},
    "accel": {
        "choices": ["kvm", "tcg"],
        "help": "what runs the guest; without it, KVM where it works",
    },
    "append": {"default": "", "metavar": "TEXT", "help": "more words for the command line"},
    "boot-timeout": {
        "type": seconds,
        "metavar": "S",
        "help": "seconds that a kernel has to speak, after the boot and each jump (default: 60; "
        "360 for a kernel with KASAN)",
    },
    "vmcores": {
        "metavar": "DIR",
        "help": "where to write the memory of guests that die (default: $PYLUO_VMCORES)",
    },
}


def add(
    add_option: Callable[..., object],
    prefix: str = "",
    *,
    only: Container[str] = tuple(_OPTIONS),
    without: Container[str] = (),
) -> None:
    """Adds the options of a guest to a parser.

    Args:
        add_option: argparse's `add_argument`, or pytest's `addoption`.
        prefix: of each option's name.
        only: the names of those that are added.
        without: the names of those that are left out.
    """
    for name, keywords in _OPTIONS.items():
        if name in only and name not in without:
            add_option(f"--{prefix}{name}", **keywords)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """A guest as a command line describes it.

    Attributes:
        kernel: to boot; None if that is settled elsewhere.
        to: to live-update to; None for the same.
        config: Kconfig fragments, and lines of them, for kernels that are built.
        memory: in bytes; None for what the kernel needs.
        cpus: how many.
        device: values of further ``-device`` options.
        network: whether it has an interface.
        accel: kvm or tcg; None for what works.
        append: more words for the kernel's command line.
        boot_timeout: seconds that a kernel has to speak; None for what it needs.
        vmcores: the folder for the memory of guests that die.
    """

    kernel: str | None
    to: str | None
    config: tuple[str, ...]
    memory: int | None
    cpus: int
    device: tuple[str, ...]
    network: bool
    accel: str | None
    append: str
    boot_timeout: float | None
    vmcores: str | None

    @classmethod
    def of(cls, parsed: argparse.Namespace, prefix: str = "") -> GuestOptions:
        """Those that were parsed; `prefix` is that of `add`, as an attribute's name has it."""
        values: dict[str, Any] = {}
        for name in cls.__slots__:
            value = getattr(parsed, prefix + name, None)
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def words(self, prefix: str) -> list[str]:
        """What to write on a command line for the same guest; `prefix` begins each option."""
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
        """The kernel to boot; it is built if the cache lacks it.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built.
        """
        assert self.kernel is not None
        return self.find(self.kernel, self.to)

    def find_next(self) -> Kernel | None:
        """The kernel to live-update to, likewise; None for the one that is booted."""
        return None if self.to is None else self.find(self.to, self.kernel)

    def find(self, what: str, *others: str | None) -> Kernel:
        """Another kernel for the same guest, likewise.

        Args:
            what: its name.
            others: those of kernels that go with it: if one of them is to be built, `config` is for
                that one, and an image that is ready is taken as it is.
        """
        from pyluo.vm.kernels.kernel import Kernel, is_image

        as_it_is = is_image(what) and not all(map(is_image, filter(None, others)))
        return Kernel.find(what, config=() if as_it_is else self.config)

    def guest(self, kernel: Kernel | None = None, to: Kernel | None = None, **more: Any) -> VM:
        """A guest, not booted yet.

        Args:
            kernel: found before; without it, it is found now, and `to` as well.
            to: likewise.
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
            accelerator=Accelerator(self.accel) if self.accel else None,
            boot_timeout=self.boot_timeout,
            vmcores=self.vmcores,
            **more,
        )
