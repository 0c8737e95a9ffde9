from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from kvm import guest_vmm
from pyluo.vm import VM

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
        "previous", to="stable", cpus=2, memory=2 << 30, call_timeout=300.0, silence=120.0
    ) as vm:
        yield vm
