"""VMs live through updates under systemd, by nothing but unit files and `pyluo update run`."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import qemu.qmp
from kvm import guest_vmm
from kvm.test_mini_vmm import check
from kvm.test_qemu_live_update import parse

import pyluo
from pyluo.vm import VM, HarnessError, Kernel, Root
from tests.snippets import command
from update import guest_update

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = guest_vmm.EXAMPLES / "systemd"
NAMES = ("vm0", "vm1")
UPDATES = 1
OUTPUT = "/run/{}.output"


def unit(name: str, **settings: str) -> str:
    """Return a unit of the examples, with the programs where the guest has them."""
    text = (UNITS / name).read_text()
    text = text.replace("ExecStart=pyluo ", "ExecStart=python3 -m pyluo ")
    for vmm, memory in ((guest_vmm.MINI_VMM, 24), (guest_vmm.QEMU, 80)):
        words = f"{Root.host_path(vmm)} run-or-resume %i --memory {memory}"
        text = text.replace(f"{vmm.name} run-or-resume %i", words)
    path = Root.host_path(Path(pyluo.__file__).parents[1])
    more = "".join(f"{key}={value}\n" for key, value in settings.items())
    return text.replace("[Service]\n", f"[Service]\nEnvironment=PYTHONPATH={path}\n{more}")


@pytest.fixture(scope="module")
def guest() -> Iterator[VM]:
    subprocess.run(["make", "-s", "-C", guest_vmm.MINI_VMM.parent], check=True)
    units = {"pyluo-update.service": unit("pyluo-update.service")}
    for name in NAMES:
        output = f"append:{OUTPUT.format(name)}"
        text = unit("mini-vmm@.service", StandardOutput=output, StandardError="journal")
        units[f"mini-vmm-{name}.service"] = text.replace("%i", name)
    with VM(
        *("previous",), to="stable", root="sid", memory=2 << 30, cpus=2, units=units,
        call_timeout=300.0, silence=120.0,
    ) as vm:  # fmt: skip
        yield vm


@pytest.fixture(scope="module")
def host_of_qemu() -> Iterator[VM]:
    """A guest whose root has a QEMU, with a VM of it as a service."""
    subprocess.run(["make", "-s", "-C", guest_vmm.QEMU.parent], check=True)
    kernel = Root.host_path(Kernel.find("previous").image)
    initrd = Root.host_path(guest_vmm.QEMU.with_name("guest.cpio"))
    qemus = "-accel kvm -cpu host -nodefaults -no-user-config -display none -no-reboot "
    qemus += f"-serial file:{OUTPUT.format('one')} -kernel {kernel} -initrd {initrd} "
    qemus += "-append 'console=ttyS0 noxsave panic=-1 vm.mib=24'"
    text = unit("qemu-vm@.service").replace("EnvironmentFile=", "EnvironmentFile=-")
    folder = Path(qemu.qmp.__file__).parents[2]
    path = f"{Root.host_path(Path(pyluo.__file__).parents[1])}:{Root.host_path(folder)}"
    more = f'Environment="PYTHONPATH={path}" "QEMU_OPTIONS={qemus}"\n'
    text = text.replace("ExecStart=", f"{more}ExecStart=").replace("%i", "one")
    units = {"pyluo-update.service": unit("pyluo-update.service"), "qemu-vm-one.service": text}
    with VM(
        *("previous",), to="stable", root="qemu", memory=4 << 30, cpus=2, units=units,
        call_timeout=600.0, silence=120.0,
    ) as vm:  # fmt: skip
        yield vm


def run(guest: VM, *words: str) -> None:
    """Have the host updated, and wait while systemd stops the services."""
    status, answers = guest.call(guest_update.ask, *words)
    assert (status, answers[-1].get("text")) == (0, "jump"), answers
    guest.call(time.sleep, guest_vmm.PATIENCE)


def test_vms_of_services_live_through_updates(guest: VM) -> None:
    before: dict[str, dict[str, int]] = {}
    for update in range(UPDATES + 1):
        guest.call(guest_update.wait_until_all_take_part, NAMES)
        for name in NAMES:
            said = guest.call(guest_update.wait_for_output, OUTPUT.format(name), 4)
            if update:
                # It was paused in the midst of a line, whose beginning went with the host's /run.
                said = said.partition("\n")[2]
            lines = check(said, 1)
            if update:
                assert lines[0]["changed0"] >= before[name]["changed0"]
                assert lines[-1]["stopped"] == update
            before[name] = lines[-1]
        status, answers = guest.call(guest_update.ask, "status")
        assert status == 0
        told = {each["name"]: each["text"] for each in answers[:-1]}
        assert all(("was paused for" in told[name]) == bool(update) for name in NAMES), told
        if update < UPDATES:
            kernel = Kernel.find("previous" if update % 2 else "stable")
            image = guest.path(kernel.image)
            shown = command("docs/guides/systemd-host.md", 1, {"/boot/vmlinuz-next": image})
            program, group, *words = shown.split()
            assert (program, group, words[-2:]) == ("pyluo", "update", [*NAMES])
            with pytest.raises(HarnessError, match="booted again"):
                run(guest, *words, "--limit", "120")
            assert guest.life.release == kernel.release


def test_a_vm_of_qemu_lives_through_an_update_as_a_service(host_of_qemu: VM) -> None:
    lines = []
    for kernel in ("previous", "stable"):
        host_of_qemu.call(guest_update.wait_until_all_take_part, ["one"])
        told: list[dict[str, str]] = []
        while not told:  # the VM's kernel speaks first
            said = host_of_qemu.call(guest_update.wait_for_output, OUTPUT.format("one"), 1)
            told = parse(said)
        lines.append(told[-1])
        assert host_of_qemu.life.release == Kernel.find(kernel).release
        if kernel == "previous":
            image = host_of_qemu.path(Kernel.find("stable").image)
            with pytest.raises(HarnessError, match="booted again"):
                run(host_of_qemu, "run", image, "--reuse-cmdline", "--limit=300", "--expect=one")
    before, after = lines
    assert before["boot"] == after["boot"]
    assert {line[name] for line in lines for name in ("wrong", "backwards")} == {"0"}
    for growing in ("lines", "clock", "realtime", "changed0"):
        assert int(after[growing]) > int(before[growing]), growing
