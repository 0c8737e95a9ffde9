"""A Linux in a QEMU lives through updates of its host's kernel; the host is a guest."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

from kvm import guest_bridge, guest_vmm, readmes
from kvm.guest_vmm import changed_pages
from kvm.stream import Stream
from pyluo.vm import Root
from tests.snippets import snippets

if TYPE_CHECKING:
    from pathlib import Path

    from pyluo.vm import VM, Kernel

README = "examples/qemu_live_update/README.md"
ADDRESS = "10.0.2.77"  # of a VM, in the network of its host
MAC = "52:54:00:00:00:77"
PORT = 7
JUMPS = 5  # with a connection
LINES = 3  # of the VM, in each of its lives, at least
TRIES = 20  # of so many lines; a thread of a VM on a busy host gets its turn late


def start(
    host: VM,
    kernel: Kernel,
    name: str,
    *options: str,
    cpus: int = 1,
    address: str = "",
    killed_before: str = "",
) -> None:
    """Start a VM with the kernel of its host, and with the tap of its name if it has an address."""
    words = "console=ttyS0 noxsave panic=-1 vm.mib=24"
    network: list[str] = []
    if address:
        words += f" vm.address={address} vm.port={PORT}"
        network = ["-device", f"virtio-net-pci,netdev={name},mac={MAC},romfile="]
        options = (*options, "--tap", name)
    qemu = [
        *("-accel", "kvm", "-cpu", "host", "-smp", str(cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", "file,id=serial,path=/proc/self/fd/1,append=on"),
        *("-serial", "chardev:serial"),
        *("-kernel", os.fspath(kernel.image)),
        *("-initrd", os.fspath(guest_vmm.QEMU.with_name("guest.cpio"))),
        *("-append", words),
        *network,
    ]
    options = ("--memory", "80", *options, "--", *qemu)
    host.call(
        guest_vmm.start,
        *("run", name, *options),
        vmm=guest_vmm.QEMU,
        killed_before=killed_before and f"Vm._put_into_store:{killed_before}",
    )


def resume(host: VM, name: str, *options: str, qemu: str = "", killed_before: str = "") -> None:
    host.call(
        guest_vmm.start,
        *("resume", name, *options),
        vmm=guest_vmm.QEMU,
        qemu=qemu,
        killed_before=killed_before and f"resume:{killed_before}",
    )


def parse(said: str) -> list[dict[str, str]]:
    """Return the whole lines of the VM's program, of one or more lives of its QEMU."""
    assert "vm failed" not in said, said[-1000:]
    # A line that QEMU was saved in is said in two parts, by two QEMUs.
    lines = re.findall(r"^vm (boot=.* backwards=\d+)\r?$", said, re.MULTILINE)
    return [dict(word.split("=") for word in line.split()) for line in lines]


def check(said: str, cpus: int) -> list[dict[str, str]]:
    """Check what a VM has said: it never booted again, nothing was wrong or went back."""
    lines = parse(said)
    assert len({line["boot"] for line in lines}) == 1
    numbers = [int(line["lines"]) for line in lines]
    assert numbers == list(range(len(numbers)))
    for name in ("wrong", "backwards"):
        assert {line[name] for line in lines} == {"0"}, name
    for name in growing(cpus):
        values = [int(line[name]) for line in lines]
        assert values == sorted(values), name
    return lines


def growing(cpus: int) -> list[str]:
    """Return the names of what grows from line to line, sooner or later."""
    return ["clock", "realtime", *(f"changed{cpu}" for cpu in range(cpus))]


def wait_until_all_goes_on(host: VM, name: str, said: str = "", cpus: int = 1) -> None:
    """Wait until the VM has said that its clocks and all its threads go on.

    Args:
        host: the host.
        name: the name of the VM.
        said: what it has said before this life of its QEMU; if nothing, what it has said so far.
        cpus: how many CPUs it has.
    """
    count = len(parse(said or host.call(guest_vmm.said, name)))  # none, if its first line was cut
    for _ in range(TRIES):
        lines = check(said + host.call(guest_vmm.wait_for_lines, name, LINES), cpus)
        before = lines[max(count - 1, 0)]
        still = [what for what in growing(cpus) if int(lines[-1][what]) <= int(before[what])]
        if not still:
            return
    raise AssertionError(f"{', '.join(still)} of {name} did not grow: {lines[-1]}")


def test_vms_never_notice_a_reboot_jump_after_jump(
    host: VM, kernel: Kernel, qemu_vms: dict[str, int]
) -> None:
    said = dict.fromkeys(qemu_vms, "")
    for name, cpus in qemu_vms.items():
        start(host, kernel, name, cpus=cpus)
    for name in qemu_vms:
        host.call(guest_vmm.wait_for_text, name, "vm boot=")
    for _ in range(guest_vmm.hops(1)):
        checksums = {}
        for name in qemu_vms:
            host.call(guest_vmm.wait_for_lines, name, LINES)
            said_before, checksums[name] = host.call(guest_vmm.store, name)
            said[name] += said_before
        host.live_update()
        for name in qemu_vms:
            in_store = host.call(guest_vmm.checksums_in_store, name)
            assert changed_pages(checksums[name], in_store) == []
        for name in qemu_vms:
            resume(host, name)
        for name, cpus in qemu_vms.items():
            wait_until_all_goes_on(host, name, said[name], cpus)
            assert host.call(guest_vmm.own_memory, name) < 32 << 20
    for name in qemu_vms:
        host.call(guest_vmm.end, name)


# Runs the QEMU of another root with that root's own libraries and firmware.
OTHER_QEMU = """\
#!/bin/sh
root={root}
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$root/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" \\
    "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
"""


def test_a_newer_qemu_goes_on_after_the_jump(host: VM, kernel: Kernel, tmp_path: Path) -> None:
    newer = tmp_path / "qemu"
    newer.write_text(OTHER_QEMU.format(root=Root.find("qemu").folder))
    newer.chmod(0o755)
    versions = [host.run([qemu, "--version"]).stdout for qemu in ("qemu-system-x86_64", newer)]
    assert all(versions)
    assert versions[0] != versions[1]
    start(host, kernel, "ages", cpus=2)
    host.call(guest_vmm.wait_for_text, "ages", "vm boot=")
    said, checksums = host.call(guest_vmm.store, "ages")
    host.live_update()
    assert changed_pages(checksums, host.call(guest_vmm.checksums_in_store, "ages")) == []
    resume(host, "ages", qemu=os.fspath(newer))
    wait_until_all_goes_on(host, "ages", said, cpus=2)
    host.call(guest_vmm.end, "ages")


def test_a_connection_with_a_vm_outlives_five_jumps(host: VM, kernel: Kernel) -> None:
    host.call(guest_bridge.build, ["net"])
    start(host, kernel, "net", address=ADDRESS)
    host.call(guest_vmm.wait_for_text, "net", "vm boot=")
    said = ""
    with Stream(host.forward(PORT, ADDRESS)) as stream:
        for _ in range(guest_vmm.hops(JUMPS)):
            stream.wait_for_more()
            said_before, checksums = host.call(guest_vmm.store, "net")
            said += said_before
            host.call(guest_bridge.preserve)
            host.live_update()
            in_store = host.call(guest_vmm.checksums_in_store, "net")
            assert changed_pages(checksums, in_store) == []
            host.call(guest_bridge.replay)
            resume(host, "net")
            stream.wait_for_more()
            assert host.call(guest_vmm.own_memory, "net") < 32 << 20
        stream.finish()
        host.call(guest_vmm.wait_for_text, "net", f" received={stream.sent} ")
        check(said + host.call(guest_vmm.said, "net"), cpus=1)
        host.call(guest_vmm.end, "net")


# Whether a VM is stored, for the next jump, if its VMM dies before a line.
DEATHS = {"_FORMAT.write(": False, "self._is_stored = True": True}


def test_a_vm_whose_vmm_or_qemu_dies_is_stored_whole_or_not_at_all(
    host: VM, kernel: Kernel
) -> None:
    said = {}
    # One VM at a time: the emulated SVM does not stand many.
    for number, where in enumerate(DEATHS):
        name = f"dying{number}"
        start(host, kernel, name, killed_before=where)
        host.call(guest_vmm.wait_for_text, name, "vm boot=")
        status = host.call(guest_vmm.signal_and_wait_for_end, name, signal.SIGUSR1)
        assert status == -signal.SIGKILL
        said[name] = host.call(guest_vmm.said, name)
    # A state that has no room leaves the VM running, until its QEMU dies.
    start(host, kernel, "stays", "--state-room", "64")
    host.call(guest_vmm.wait_for_text, "stays", "vm boot=")
    host.call(guest_vmm.signal_and_wait, "stays", signal.SIGUSR1, "runs on: the state has more")
    wait_until_all_goes_on(host, "stays")
    host.call(guest_vmm.kill_child, "stays")
    status, told = host.call(guest_vmm.wait_for_end, "stays")
    assert (status, "QEMU has ended with status -9" in told) == (1, True)
    assert host.call(guest_vmm.entries_of_outgoing, "stays") is None
    # A VM that was stored runs on; it is stored again, and its QEMU dies.
    start(host, kernel, "dies")
    host.call(guest_vmm.wait_for_text, "dies", "vm boot=")
    _, checksums = host.call(guest_vmm.store, "dies")
    assert changed_pages(checksums, host.call(guest_vmm.checksums_of_process, "dies")) == []
    host.call(guest_vmm.go_on, "dies")
    wait_until_all_goes_on(host, "dies")
    said["dies"], _ = host.call(guest_vmm.store, "dies")
    host.call(guest_vmm.kill_child, "dies")
    assert host.call(guest_vmm.wait_for_end, "dies")[0] == 0
    host.live_update()
    resume(host, "dying0")
    status, told = host.call(guest_vmm.wait_for_end, "dying0")
    assert (status, "it was not stored" in told) == (1, True)
    assert host.call(guest_vmm.finish_what_is_lost, "dying0") == ["ram", "state"]
    for name in ("dying1", "dies"):
        for place in ("await qemu.load(state)", "store = incoming.renew("):
            resume(host, name, killed_before=place)
            assert host.call(guest_vmm.wait_for_end, name)[0] == -signal.SIGKILL
        resume(host, name)
        wait_until_all_goes_on(host, name, said[name])
        host.call(guest_vmm.end, name)


def test_the_readmes_commands_work_as_they_stand(host: VM, kernel: Kernel) -> None:
    before, after = snippets(README, "sh")
    # KVM of an emulated host has a broken XSAVE.
    variables = {"KERNEL": os.fspath(kernel.image), "VM_CMDLINE": "noxsave"}
    host.call(guest_vmm.run_shell, before, variables)
    readmes.jump(host, README)
    shown = host.call(guest_vmm.run_shell, after, variables)
    assert "vm0 runs again" in shown
    assert " wrong=0 backwards=0" in shown
    host.call(guest_vmm.kill_vmms)
    host.call(guest_vmm.discard, "vm0")
