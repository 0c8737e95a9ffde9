"""A Linux in a QEMU lives through updates of its host's kernel; the host is a guest."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

from kvm import guest_vmm
from kvm.guest_vmm import changed_pages

if TYPE_CHECKING:
    from pyluo.vm import VM, Kernel

LINES = 3  # of the VM, in each of its lives, at least


def start(host: VM, kernel: Kernel, name: str, *options: str, cpus: int = 1) -> None:
    """Start a VM with the kernel of its host."""
    qemu = [
        *("-accel", "kvm", "-cpu", "host", "-smp", str(cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", "file,id=serial,path=/proc/self/fd/1,append=on"),
        *("-serial", "chardev:serial"),
        *("-kernel", os.fspath(kernel.image)),
        *("-initrd", os.fspath(guest_vmm.QEMU.with_name("guest.cpio"))),
        *("-append", "console=ttyS0 noxsave panic=-1 vm.mib=32"),
    ]
    options = ("--memory", "96", *options, "--", *qemu)
    host.call(guest_vmm.start, "run", name, *options, vmm=guest_vmm.QEMU)


def resume(host: VM, name: str) -> None:
    host.call(guest_vmm.start, "resume", name, vmm=guest_vmm.QEMU)


def parse(said: str) -> list[dict[str, str]]:
    """Return the whole lines of the VM's program, of one or more lives of its QEMU."""
    assert "vm failed" not in said, said
    # A line that QEMU was saved in is said in two parts, by two QEMUs.
    lines = re.findall(r"^vm (boot=.* backwards=\d+)\r?$", said, re.MULTILINE)
    return [dict(word.split("=") for word in line.split()) for line in lines]


def check(said: str, cpus: int) -> list[dict[str, str]]:
    """Check what a VM has said: it never booted again, nothing was wrong or stood still."""
    lines = parse(said)
    assert len({line["boot"] for line in lines}) == 1
    numbers = [int(line["lines"]) for line in lines]
    assert numbers == list(range(len(numbers)))
    for name in ("wrong", "backwards"):
        assert {line[name] for line in lines} == {"0"}, name
    for name in ["clock", "realtime", *(f"changed{cpu}" for cpu in range(cpus))]:
        values = [int(line[name]) for line in lines]
        assert values == sorted(values), name
        assert values[-1] > values[-LINES], name
    return lines


def test_vms_never_notice_a_reboot_jump_after_jump(host: VM, kernel: Kernel) -> None:
    vms = {"one": 1, "two": 2}  # CPUs
    said = dict.fromkeys(vms, "")
    for name, cpus in vms.items():
        start(host, kernel, name, cpus=cpus)
    for name in vms:
        host.call(guest_vmm.wait_for_text, name, "vm boot=")
    for _ in range(guest_vmm.hops(2)):
        checksums = {}
        for name in vms:
            host.call(guest_vmm.wait_for_lines, name, LINES)
            said_before, checksums[name] = host.call(guest_vmm.store, name)
            said[name] += said_before
        host.live_update()
        for name in vms:
            in_store = host.call(guest_vmm.checksums_in_store, name)
            assert changed_pages(checksums[name], in_store) == []
        for name in vms:
            resume(host, name)
        for name, cpus in vms.items():
            check(said[name] + host.call(guest_vmm.wait_for_lines, name, LINES + 1), cpus)
            assert host.call(guest_vmm.own_memory, name) < 32 << 20
    for name in vms:
        assert host.call(guest_vmm.signal_and_wait_for_end, name, signal.SIGTERM) == 0
        assert host.call(guest_vmm.entries_of_outgoing, name) is None
