"""Dma-bufs of a device's memory, on the kernel that has them."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import guest_vfio
import pytest
from guest_vfio import bound

from pyluo import LuoError
from pyluo.iommufd import IommuFd
from pyluo.vfio import Area, Command, Feature, PciRegion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import VM

PAGE = 4096
SIZE = 1 << 20  # of the BAR


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
        with pytest.raises(LuoError, match="whole pages") as caught:
            device.features.export_dma_buf(PciRegion.BAR0, [area])
        assert caught.value.errno == errno.EINVAL


def test_without_an_area_there_is_no_dma_buf() -> None:
    with bound(guest_vfio.edu()) as device, pytest.raises(LuoError):
        device.features.export_dma_buf(PciRegion.BAR0, [])


@pytest.mark.parametrize("region", [PciRegion.BAR2, PciRegion.CONFIG])
def test_what_is_no_bar_has_no_dma_buf(region: PciRegion) -> None:
    with bound(guest_vfio.edu()) as device:
        with pytest.raises(LuoError) as caught:
            device.features.export_dma_buf(region, [Area(0, PAGE)])
        assert caught.value.errno == errno.ENODEV


def test_a_dma_buf_is_mapped_for_devices_until_its_memory_is_switched_off() -> None:
    with IommuFd() as iommufd, bound(guest_vfio.edu(), iommufd) as device:
        ioas = iommufd.alloc_ioas()
        device.attach(ioas)
        with device.features.export_dma_buf(PciRegion.BAR0, [Area(0, SIZE)]) as buffer:
            mapping = ioas.map_file(buffer, length=SIZE)
            assert mapping.length == SIZE
            ioas.unmap(mapping)
            device.config.command &= ~Command.MEMORY
            with pytest.raises(LuoError) as caught:
                ioas.map_file(buffer, length=SIZE)
            assert caught.value.errno == errno.ENODEV
            device.config.command |= Command.MEMORY
            ioas.map_file(buffer, length=SIZE)
        ioas.unmap_all()


def test_a_dma_buf_outlives_its_device_and_leads_nowhere_then() -> None:
    with IommuFd() as iommufd:
        ioas = iommufd.alloc_ioas()
        with bound(guest_vfio.edu()) as device:
            buffer = device.features.export_dma_buf(PciRegion.BAR0, [Area(0, PAGE)])
        with buffer, pytest.raises(LuoError) as caught:
            ioas.map_file(buffer, length=PAGE)
        assert caught.value.errno == errno.ENODEV
