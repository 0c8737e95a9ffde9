"""Tests of interrupts that the IOMMU does not remap: they are unsafe, and fewer."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyluo import RequestError
from pyluo.errors import VfioError
from pyluo.iommufd import IommuFd
from pyluo.vfio import PciDevice, PciIrq, VfioDevice
from vfio.guest_vfio import bound, eventfds, signalled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import VM, Kernel

VECTORS = 16
UNSAFE = Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts")


@pytest.fixture(scope="module")
def vm(kernel: Kernel) -> Iterator[VM]:
    from pyluo.vm import VM

    devices = ["intel-iommu,intremap=off,aw-bits=39", "nec-usb-xhci,msi=on,msix=off"]
    with VM(kernel, devices=devices, append="intel_iommu=on vfio-pci.ids=1033:0194") as guest:
        yield guest


pytestmark = [pytest.mark.in_guest, pytest.mark.usefixtures("vm")]


def test_a_device_whose_interrupts_are_not_isolated_is_refused() -> None:
    with (
        VfioDevice.open(find_controller()) as device,
        IommuFd() as iommufd,
        pytest.raises(VfioError, match="allow_unsafe_interrupts") as caught,
    ):
        device.bind(iommufd)
    assert caught.value.errno == errno.EPERM


def test_fewer_vectors_than_asked_for_are_none_and_told() -> None:
    with allow_unsafe_interrupts(), bound(find_controller()) as device, eventfds(VECTORS) as events:
        msi = device.irq(PciIrq.MSI)
        assert msi.info.count == VECTORS
        with pytest.raises(RequestError, match="has 1 left") as caught:
            msi.enable(events)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(RequestError):
            msi.trigger()
        msi.enable(events[:1])
        msi.trigger()
        assert signalled(events[0]) == 1


def find_controller() -> PciDevice:
    [device] = PciDevice.find(0x1033, 0x0194)
    return device


@contextmanager
def allow_unsafe_interrupts() -> Iterator[None]:
    UNSAFE.write_text("Y")
    try:
        yield
    finally:
        UNSAFE.write_text("N")
