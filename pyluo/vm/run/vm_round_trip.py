"""Carry a VM over a live update of its host, which is a guest, and compare what the VM says."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyluo
from pyluo.guest import demo_vm
from pyluo.vm import progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine.timeline import Event
from pyluo.vm.machine.vm import VM

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["VmLine", "VmRoundTrip", "run_vm_round_trip"]

_EXAMPLE = Path(pyluo.__file__).parents[1] / "examples" / "qemu_live_update"
_MEMORY = 4 << 30  # bytes, of the host; emulated nested VMs need QEMU's larger translation buffer
# KVM of an emulated host has a broken XSAVE.
_CMDLINE = "console=ttyS0 noxsave panic=-1 vm.mib=24"
_SILENCE = 120.0  # seconds; a host that emulates a VM says little


@dataclass(frozen=True, slots=True)
class VmLine:
    """A line of the program in the VM.

    Attributes:
        boot: the id of the boot of the VM's kernel.
        number: the number of the line.
        changed: how many pages of its memory the program has changed, and checked before.
        clock: the VM's monotonic clock in seconds.
        wrong: how many words of its memory or files were not as they were written.
        backwards: how often one of its clocks went back.
    """

    boot: str
    number: int
    changed: int
    clock: float
    wrong: int
    backwards: int

    @classmethod
    def parse(cls, line: str) -> VmLine:
        """Return what a line says; see examples/qemu_live_update/guest/init.c."""
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        return cls(
            boot=words["boot"],
            number=int(words["lines"]),
            changed=int(words["changed0"]),
            clock=int(words["clock"]) / 1e9,
            wrong=int(words["wrong"]),
            backwards=int(words["backwards"]),
        )


@dataclass(frozen=True, slots=True)
class VmRoundTrip:
    """The result of a live update of a host with one VM.

    Attributes:
        before: the release of the kernel that the host left.
        after: the release of the kernel that it jumped to.
        last: the VM's last line before the jump.
        first: its first line after the jump.
        later: a line some time later.
        events: what happened, in seconds since the VM was told to pause.
    """

    before: str
    after: str
    last: VmLine
    first: VmLine
    later: VmLine
    events: tuple[Event, ...]

    @property
    def passed(self) -> bool:
        """Whether the VM did not boot again, lost nothing, and goes on."""
        lines = (self.last, self.first, self.later)
        return (
            len({line.boot for line in lines}) == 1
            and self.first.number in (self.last.number + 1, self.last.number + 2)
            and self.last.clock <= self.first.clock < self.later.clock
            and self.last.changed <= self.first.changed < self.later.changed
            and not any(line.wrong or line.backwards for line in lines)
        )


def run_vm_round_trip(kernel: str, to: str | None) -> VmRoundTrip:
    """Boot a host with a VM, live-update the host, and go on with the VM.

    Args:
        kernel: the kernel to boot, in the host and in the VM.
        to: the kernel that the host jumps to; None for `kernel`.

    Raises:
        GuestFailure: the host died, or its kernel complained.
        HarnessError: the host could not be started, or there is no VM: it is among the examples of
            a checkout.
    """
    program = os.fspath(_EXAMPLE / "qemu_live_update.py")
    _build()
    with (
        progress.status("booting") as show,
        VM(kernel, to=to, cpus=2, memory=_MEMORY, call_timeout=300.0, silence=_SILENCE) as host,
    ):
        before = host.life.release
        show("starting a VM in the guest")
        host.call(demo_vm.start, program, _options(host.kernel.image))
        show("pausing the VM, and storing it")
        began = time.monotonic()
        host.call(demo_vm.store)
        stored = time.monotonic()
        last = host.call(demo_vm.last_line)
        show("live-updating")
        host.live_update()
        show("resuming the VM")
        host.call(demo_vm.resume, program)
        events = [Event("VM stored", stored), *host.timeline.events]
        return VmRoundTrip(
            before=before,
            after=host.life.release,
            last=VmLine.parse(last),
            first=VmLine.parse(host.call(demo_vm.last_line, 0)),
            later=VmLine.parse(host.call(demo_vm.last_line)),
            events=tuple(Event(each.name, each.at - began) for each in events),
        )


def _options(image: Path) -> Sequence[str]:
    """Return QEMU's options for the VM."""
    return [
        *("-accel", "kvm", "-cpu", "host", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-no-reboot"),
        *("-chardev", "file,id=serial,path=/proc/self/fd/1,append=on", "-serial", "chardev:serial"),
        *("-kernel", os.fspath(image), "-initrd", os.fspath(_EXAMPLE / "guest.cpio")),
        *("-append", _CMDLINE),
    ]


def _build() -> None:
    """Build the VM's initial ramdisk."""
    if not _EXAMPLE.is_dir():
        raise HarnessError(
            "the VM of the demo is an example of the source, which is not here",
            "run it in a checkout: git clone, and `make demo` once",
        )
    try:
        command = ["make", "-s", "-C", os.fspath(_EXAMPLE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise HarnessError(
            f"the VM of the demo cannot be built: {problem}",
            "it needs gcc, make and cpio: `make demo` installs them",
        )
