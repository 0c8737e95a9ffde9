from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from kvm import guest_vmm
from pyluo.vm import VM
from pyluo.vm.machine.accelerator import Accelerator, Choice
from pyluo.vm.machine.qemu import find_binary, nests, version

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package", autouse=True)
def programs() -> None:
    """What runs in the VMs."""
    for vmm in (guest_vmm.MINI_VMM, guest_vmm.PASSTHROUGH, guest_vmm.QEMU):
        subprocess.run(["make", "-s", "-C", vmm.parent], check=True)


@pytest.fixture(scope="module")
def host() -> Iterator[VM]:
    with VM(
        "previous",
        to="stable",
        cpus=2,
        memory=4 << 30,
        network=True,
        call_timeout=300.0,
        silence=120.0,
    ) as vm:
        yield vm


@pytest.fixture(params=[{"two": 2}, {"one": 1, "two": 2}], ids=["two", "both"])
def qemu_vms(request: pytest.FixtureRequest) -> dict[str, int]:
    """The VMs of a test, by name, and how many CPUs each has."""
    vms: dict[str, int] = request.param
    qemu = find_binary()
    if len(vms) > 1 and Choice.make(qemu).accelerator is Accelerator.TCG and not nests(qemu):
        pytest.skip(f"{version(qemu)} does not emulate two VMs with firmware at once")
    return vms
