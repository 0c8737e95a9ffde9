"""Tests of dma-bufs of a device's memory, on the kernel that supports them."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from pyluo import Memfd, RequestError
from pyluo.iommufd import IommuFd
from pyluo.vfio import Area, Command, Feature, PciRegion
from vfio import guest_vfio
from vfio.guest_edu import Edu
from vfio.guest_vfio import bound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import VM

PAGE = 4096
SIZE = 1 << 20  # bytes of the BAR
RAM, REGISTERS = 0x100000, 0x200000  # their IOVAs, which an edu can reach
MARK = 0x1234


@pytest.fixture(scope="module")
def vm() -> Iterator[VM]:
    from pyluo.vm import VM

    with VM("selftest", devices=guest_vfio.DEVICES, append=guest_vfio.CMDLINE) as guest:
        yield guest


pytestmark = [pytest.mark.in_guest, pytest.mark.usefixtures("vm")]


def test_parts_of_a_bar_become_one_dma_buf() -> None:
    areas = [Area(0, PAGE), Area(8 * PAGE, 2 * PAGE)]
    with bound(guest_vfio.edu()) as device:
        assert device.features.probe(Feature.DMA_BUF, get=True)
        assert not device.features.probe(Feature.DMA_BUF, set=True)
        with device.features.export_dma_buf(PciRegion.BAR0, areas) as buffer:
            assert "dmabuf" in os.readlink(f"/proc/self/fd/{buffer.fileno()}")
            assert os.lseek(buffer.fileno(), 0, os.SEEK_END) == 3 * PAGE
            assert fcntl.fcntl(buffer.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize(
    "area", [Area(0, 0), Area(1, PAGE), Area(0, PAGE + 1), Area(SIZE, PAGE), Area(0, SIZE + PAGE)]
)
def test_an_area_that_is_not_of_the_bars_pages_is_refused(area: Area) -> None:
    with bound(guest_vfio.edu()) as device:
        with pytest.raises(RequestError, match="whole pages") as caught:
            device.features.export_dma_buf(PciRegion.BAR0, [area])
        assert caught.value.errno == errno.EINVAL


def test_without_an_area_there_is_no_dma_buf() -> None:
    with bound(guest_vfio.edu()) as device, pytest.raises(RequestError):
        device.features.export_dma_buf(PciRegion.BAR0, [])


@pytest.mark.parametrize("region", [PciRegion.BAR2, PciRegion.CONFIG])
def test_what_is_no_bar_has_no_dma_buf(region: PciRegion) -> None:
    with bound(guest_vfio.edu()) as device:
        with pytest.raises(RequestError) as caught:
            device.features.export_dma_buf(region, [Area(0, PAGE)])
        assert caught.value.errno == errno.ENODEV


def test_another_device_reaches_a_dma_buf_until_its_memory_is_switched_off() -> None:
    with (
        IommuFd() as iommufd,
        Memfd.create("ram", PAGE) as ram,
        bound(guest_vfio.e1000e(), iommufd) as device,
    ):
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram, iova=RAM)
        registers = device.region(PciRegion.BAR0)
        size = registers.info.size
        registers.write32(guest_vfio.E1000E_VLAN_TYPE, MARK)
        edu = Edu.open(iommufd, ioas)

        def read_by_edu() -> int:
            """Return the register as the edu reads it; 0 if the IOMMU stops the read."""
            ram.write(bytes(4), 0)
            edu.load(RAM, 4)
            edu.load(REGISTERS + guest_vfio.E1000E_VLAN_TYPE, 4)
            edu.store(RAM, 4)
            return int.from_bytes(ram.read(4, 0), "little")

        with edu.device, device.features.export_dma_buf(PciRegion.BAR0, [Area(0, size)]) as buffer:
            mapping = ioas.map_file(buffer, iova=REGISTERS, length=size)
            assert mapping.length == size
            assert read_by_edu() == MARK
            device.config.command &= ~Command.MEMORY
            with pytest.raises(RequestError) as caught:
                ioas.map_file(buffer, length=size)
            assert caught.value.errno == errno.ENODEV
            device.config.command |= Command.MEMORY
            # The register can be read again, but its mapping in the IOMMU stays revoked.
            assert registers.read32(guest_vfio.E1000E_VLAN_TYPE) == MARK
            assert read_by_edu() == 0
            ioas.unmap(mapping)
            ioas.map_file(buffer, iova=REGISTERS, length=size)
            assert read_by_edu() == MARK
        ioas.unmap_all()


def test_a_dma_buf_outlives_its_device_and_leads_nowhere_then() -> None:
    with IommuFd() as iommufd:
        ioas = iommufd.alloc_ioas()
        with bound(guest_vfio.edu()) as device:
            buffer = device.features.export_dma_buf(PciRegion.BAR0, [Area(0, PAGE)])
        with buffer, pytest.raises(RequestError) as caught:
            ioas.map_file(buffer, length=PAGE)
        assert caught.value.errno == errno.ENODEV
