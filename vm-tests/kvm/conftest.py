from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from kvm import guest_vmm
from pyluo.vm import VM
from pyluo.vm.machine.accelerator import Accelerator, Choice
from pyluo.vm.machine.qemu import find_binary, version

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package", autouse=True)
def programs() -> None:
    """What runs in the VMs."""
    for vmm in (guest_vmm.MINI_VMM, guest_vmm.QEMU):
        subprocess.run(["make", "-s", "-C", vmm.parent], check=True)


@pytest.fixture(scope="module")
def host() -> Iterator[VM]:
    with VM(
        "previous", to="stable", cpus=2, memory=4 << 30, call_timeout=300.0, silence=120.0
    ) as vm:
        yield vm


@pytest.fixture(params=[{"one": 1}, {"two": 2}, {"one": 1, "two": 2}], ids=["one", "two", "both"])
def vms(request: pytest.FixtureRequest) -> dict[str, int]:
    """The VMs of a test, by name, and how many CPUs each has."""
    vms: dict[str, int] = request.param
    if len(vms) > 1 and (reason := why_only_one_vm()):
        pytest.skip(reason)
    return vms


def why_only_one_vm() -> str | None:
    """Return why no two VMs can run in a guest at once; None if they can."""
    qemu = find_binary()
    if Choice.make(qemu).accelerator is Accelerator.KVM:
        return None
    name = version(qemu)
    number = re.search(r"version (\d+)", name)
    if number is None or int(number[1]) >= 10:
        return None
    # The manual has the figures.
    return f"{name} does not emulate two VMs at once"
