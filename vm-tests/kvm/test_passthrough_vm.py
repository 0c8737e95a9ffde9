"""A VM that drives a device by itself lives, with it, through updates of its host's kernel."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from vfio import guest_edu

from kvm import guest_vmm, readmes
from kvm.guest_vmm import PASSTHROUGH, changed_pages
from kvm.test_mini_vmm import check, parse
from pyluo.vm import VM
from tests.snippets import snippets

if TYPE_CHECKING:
    from collections.abc import Iterator

README = "examples/passthrough_vm/README.md"
CPUS = 2
LINES = 3  # of the VM, in each of its lives, at least
TRIES = 20  # of so many lines
COPIES = 3  # from the VM's RAM to the device and back, in each life, at least


@pytest.fixture(scope="module")
def host() -> Iterator[VM]:
    with VM(
        "previous",
        to="stable",
        cpus=2,
        memory=2 << 30,
        devices=guest_edu.DEVICES,
        append=guest_edu.APPEND,
        call_timeout=300.0,
        silence=120.0,
    ) as vm:
        yield vm


def wait_for_copies(host: VM, said: str = "") -> None:
    """Wait until the VM has copied to the device and back, and check all that it has said.

    Args:
        host: the host.
        said: what it has said before this life of its VMM.
    """
    lines = parse(said + host.call(guest_vmm.said, "vm0"))
    before = lines[-1]["copies"] if lines else 0
    for _ in range(TRIES):
        lines = check(said + host.call(guest_vmm.wait_for_lines, "vm0", LINES), CPUS)
        for name in ("damaged", "late"):
            assert {line[name] for line in lines} == {0}, name
        assert {line["device"] for line in lines} == {0x010000ED}
        last = lines[-1]
        assert last["interrupts"] in range(2 * last["copies"], 2 * last["copies"] + 2)
        if last["copies"] >= before + COPIES:
            return
    raise AssertionError(f"the device does not go on: {last}")


def test_a_vm_drives_its_device_before_and_after_each_jump(host: VM) -> None:
    device = host.call(find_edu)
    host.call(guest_vmm.start, "run", "vm0", "--cpus", str(CPUS), vmm=PASSTHROUGH, device=device)
    wait_for_copies(host)
    # If the jump does not come, the VM and its device go on.
    host.call(guest_vmm.store, "vm0")
    host.call(guest_vmm.go_on, "vm0")
    wait_for_copies(host)
    # The device cannot move to another process, so the VM does not.
    host.call(guest_vmm.signal_and_wait, "vm0", signal.SIGHUP, "stays: it has a device")
    said = ""
    for _ in range(guest_vmm.hops(2)):
        said_before, checksums = host.call(guest_vmm.store, "vm0")
        said += said_before
        host.live_update()
        in_store = host.call(guest_vmm.checksums_in_store, "vm0")
        assert changed_pages(checksums, in_store) == []
        host.call(guest_vmm.start, "resume", "vm0", vmm=PASSTHROUGH)
        wait_for_copies(host, said)
    host.call(guest_vmm.end, "vm0")


def find_edu() -> str:
    return guest_edu.find_edu().address


def test_the_readmes_commands_work_as_they_stand(host: VM) -> None:
    before, after = snippets(README, "sh")
    host.call(guest_vmm.run_shell, before, {"DEVICE": host.call(find_edu)})
    readmes.jump(host, README)
    shown = host.call(guest_vmm.run_shell, after)
    assert "vm0 runs again" in shown
    assert " damaged=0 late=0" in shown
    host.call(guest_vmm.kill_vmms)
    host.call(guest_vmm.discard, "vm0")


def test_a_new_vm_needs_a_device_and_leaves_nothing_without_one(host: VM) -> None:
    host.call(guest_vmm.start, "run", "none", vmm=PASSTHROUGH)
    status, told = host.call(guest_vmm.wait_for_end, "none")
    assert (status, "--device ADDRESS" in told) == (1, True)
    assert host.call(guest_vmm.entries_of_outgoing, "none") is None
