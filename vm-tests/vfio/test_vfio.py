"""Tests of VFIO devices, in guests with several devices that QEMU emulates."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import sys
import threading
import uuid
import warnings
from typing import TYPE_CHECKING

import pytest

from pyluo import (
    DeviceInUseError,
    DriverNotFoundError,
    FeatureNotSupportedError,
    IommuError,
    Memfd,
    PciDeviceNotFoundError,
    RequestError,
    VfioError,
)
from pyluo.descriptor import OwnedFd
from pyluo.iommufd import IommuFd, IovaRange
from pyluo.probe import _CREATE_VM
from pyluo.vfio import (
    Area,
    Bar,
    Command,
    DeviceFlags,
    DriverBinding,
    Feature,
    IrqFlags,
    KvmVfio,
    MigrationState,
    PciCapabilityId,
    PciDevice,
    PciExtendedCapabilityId,
    PciIrq,
    PciRegion,
    RegionFlags,
    VfioDevice,
)
from vfio import guest_vfio
from vfio.guest_vfio import (
    bound,
    driven,
    eventfds,
    registers_of_edu,
    signalled,
    signalled_by_now,
    wait_for_register,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.vm import VM, Kernel


@pytest.fixture(scope="module", params=[None, "previous"], ids=["kernel", "previous"])
def vm(request: pytest.FixtureRequest, kernel: Kernel) -> Iterator[VM]:
    from pyluo.vm import VM

    with VM(
        request.param or kernel, devices=guest_vfio.DEVICES, append=guest_vfio.CMDLINE
    ) as guest:
        yield guest


pytestmark = [pytest.mark.in_guest, pytest.mark.usefixtures("vm")]


# The PCI bus.


def test_a_device_is_found_by_its_ids_and_by_its_address() -> None:
    edu = guest_vfio.edu()
    assert edu in PciDevice.find(0x1234)
    assert PciDevice.find(0x1234, 0x11E9) == ()
    assert PciDevice.at(edu.address) == PciDevice.at(edu.address.removeprefix("0000:")) == edu
    assert (edu.vendor_id, edu.device_id, edu.class_code) == (0x1234, 0x11E8, 0x00FF00)
    assert edu.driver == "vfio-pci"
    assert edu.vfio_name == "vfio0"
    assert edu.node == "/dev/vfio/devices/vfio0"
    assert edu.group_devices == (edu,)
    assert edu.iommu_group is not None


def test_functions_that_the_iommu_cannot_tell_apart_are_one_group() -> None:
    one, other = guest_vfio.e1000e(), guest_vfio.nvme()
    assert one.iommu_group == other.iommu_group
    assert one.group_devices == other.group_devices == (one, other)


@pytest.mark.parametrize("address", ["", "00:04", "0000:00:20.0", "00:04.8", "../00:04.0"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not the address of a PCI device"):
        PciDevice.at(address)


def test_a_device_that_is_not_there_is_told_as_such() -> None:
    with pytest.raises(PciDeviceNotFoundError, match=r"0000:00:1e\.7"):
        PciDevice.at("0000:00:1e.7")
    gone = PciDevice("0000:00:1e.7")
    with pytest.raises(PciDeviceNotFoundError):
        assert gone.vendor_id
    with pytest.raises(PciDeviceNotFoundError):
        assert gone.driver


def test_a_device_goes_to_vfio_and_back_to_its_driver() -> None:
    device = guest_vfio.random_numbers()
    before = device.bind_driver()
    assert before == DriverBinding("virtio-pci", None)
    assert (device.driver, device.driver_override) == ("vfio-pci", "vfio-pci")
    assert os.path.exists(device.node)
    assert device.bind_driver() == DriverBinding("vfio-pci", "vfio-pci")
    device.restore_driver(before)
    assert (device.driver, device.driver_override) == ("virtio-pci", None)
    assert device.vfio_name is None


def test_a_device_that_nobody_had_goes_back_to_nobody() -> None:
    device = guest_vfio.e1000e()
    before = device.bind_driver()
    assert before == DriverBinding(None, None)
    assert device.driver == "vfio-pci"
    device.restore_driver(before)
    assert device.driver is None
    assert device.driver_override is None


def test_a_device_is_taken_from_its_driver_and_given_back() -> None:
    edu = guest_vfio.edu()
    edu.unbind_driver()
    edu.unbind_driver()
    assert edu.driver is None
    with pytest.raises(RequestError, match="bind_driver") as caught:
        VfioDevice.open(edu)
    assert caught.value.errno == errno.ENODEV
    edu.restore_driver(DriverBinding("vfio-pci", None))
    assert edu.driver == "vfio-pci"


def test_a_driver_that_is_not_there_changes_nothing() -> None:
    device = guest_vfio.random_numbers()
    with pytest.raises(DriverNotFoundError, match="modprobe"):
        device.bind_driver("no-such-driver")
    assert (device.driver, device.driver_override) == ("virtio-pci", None)


def test_a_device_that_vfio_refuses_stays_with_its_driver() -> None:
    port = guest_vfio.port()  # a bridge, which vfio-pci refuses
    with pytest.raises(RequestError) as caught:
        port.bind_driver()
    assert caught.value.errno == errno.EINVAL
    assert (port.driver, port.driver_override) == ("pcieport", None)


def test_a_device_is_not_taken_from_who_has_it_open() -> None:
    edu = guest_vfio.edu()
    with bound(edu), pytest.raises(DeviceInUseError, match=f"PID {os.getpid()}"):
        edu.unbind_driver()
    edu.unbind_driver()
    edu.bind_driver()


def test_who_has_a_device_open_is_told_that_somebody_wants_it() -> None:
    edu = guest_vfio.edu()
    with eventfds(1) as [event], IommuFd() as iommufd:
        device = VfioDevice.open(edu)
        device.bind(iommufd)
        device.irq(PciIrq.REQUEST).enable([event])
        # The kernel blocks the write until the device is closed.
        thread = threading.Thread(target=edu._write, args=("driver/unbind", edu.address))
        thread.start()
        try:
            assert signalled(event)
            assert thread.is_alive()
        finally:
            device.close()
            thread.join()
    assert edu.driver is None
    edu.bind_driver()


# Opening and binding.


def test_nothing_can_be_done_before_a_device_is_bound() -> None:
    with VfioDevice.open(guest_vfio.edu()) as device, IommuFd() as iommufd:
        assert not device.bound
        ioas = iommufd.alloc_ioas()
        for refused in (
            device.info,
            device.regions,
            device.reset,
            device.hot_reset,
            device.hot_reset_info,
            device.detach_pt,
            lambda: device.config,
            lambda: device.irq(PciIrq.MSI),
            lambda: device.attach(ioas),
            lambda: device.features.probe(Feature.MIGRATION),
            lambda: device.iommu_device,
        ):
            with pytest.raises(VfioError):
                refused()
        ioas.destroy()


def test_a_device_is_bound_until_it_is_closed() -> None:
    with IommuFd() as iommufd:
        device = VfioDevice.open("/dev/vfio/devices/vfio0")
        known = device.bind(iommufd)
        assert device.bound
        assert known is device.iommu_device
        assert iommufd.objects == (known,)
        assert device.pci == guest_vfio.edu()
        assert str(device) == f"VFIO device {guest_vfio.edu().address}"
        device.close()
        assert known.destroyed
        assert not device.bound
        for refused in (device.info, device.reset, device.detach_pt):
            with pytest.raises(ValueError, match="closed"):
                refused()
        assert iommufd.objects == ()
        device.close()


def test_a_device_has_one_owner_at_a_time() -> None:
    edu = guest_vfio.edu()
    with bound(edu) as device, IommuFd() as iommufd:
        own = re.escape(f"(PID {os.getpid()})")
        with VfioDevice.open(edu) as second, pytest.raises(DeviceInUseError, match=own):
            second.bind(iommufd)
        with pytest.raises(DeviceInUseError):
            device.bind(iommufd)
    with bound(edu):
        pass


def test_a_group_has_one_iommufd_at_a_time() -> None:
    with (
        bound(guest_vfio.e1000e()),
        driven(guest_vfio.nvme()) as nvme,
        VfioDevice.open(nvme) as other,
        IommuFd() as iommufd,
        pytest.raises(VfioError, match="IOMMU group"),
    ):
        other.bind(iommufd)


def test_a_vm_is_told_of_its_devices() -> None:
    with (
        OwnedFd(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as kvm,
        OwnedFd(_CREATE_VM(kvm.fileno())) as machine,
        VfioDevice.open(guest_vfio.edu()) as device,
        IommuFd() as iommufd,
        KvmVfio.create(machine) as devices,
    ):
        with pytest.raises(RequestError, match="pseudo device already"):
            KvmVfio.create(machine)
        devices.add(device)
        with pytest.raises(RequestError, match="already") as caught:
            devices.add(device)
        assert caught.value.errno == errno.EEXIST
        device.bind(iommufd)
        devices.remove(device)
        with pytest.raises(RequestError, match="does not have") as caught:
            devices.remove(device)
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(RequestError, match="not a VFIO device") as caught:
            devices.add(iommufd)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(RequestError) as caught, IommuFd() as iommufd:
        KvmVfio.create(iommufd)
    assert caught.value.errno == errno.ENOTTY


def test_the_configuration_space_is_asked_for_once() -> None:
    calls = []

    def count(frame: object, event: str, argument: object) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") == "pyluo_ioctl":
            calls.append(argument)

    with bound(guest_vfio.edu()) as device:
        assert device.config.vendor_id == 0x1234
        sys.setprofile(count)
        try:
            assert device.config.device_id == 0x11E8
            assert calls == []
            device.info()
            assert len(calls) == 1
        finally:
            sys.setprofile(None)


def test_a_token_for_a_device_without_functions_is_refused() -> None:
    with (
        VfioDevice.open(guest_vfio.edu()) as device,
        IommuFd() as iommufd,
        pytest.raises(RequestError, match="takes no token"),
    ):
        device.bind(iommufd, token=uuid.uuid4())


def test_what_is_no_iommufd_is_refused() -> None:
    with VfioDevice.open(guest_vfio.edu()) as device, Memfd.create("ram", 4096) as memfd:
        with pytest.raises(RequestError) as caught:
            device.bind(memfd)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EBADFD
        assert not device.bound


def test_what_a_signal_handler_asks_of_a_device_in_use_is_refused() -> None:
    with VfioDevice.open(guest_vfio.edu()) as device, IommuFd() as iommufd:

        class Interrupting(IommuFd):
            """An iommufd that is asked for its number in the middle of a request."""

            requests: tuple[Callable[[], object], ...] = ()

            def fileno(self) -> int:
                for request in self.requests:
                    with pytest.raises(RequestError, match="signal handler") as caught:
                        request()
                    assert caught.value.errno == errno.EDEADLK
                return super().fileno()

        with Interrupting.from_fd(os.dup(iommufd.fileno())) as interrupting:
            Interrupting.requests = device.close, device.detach, device.detach_pt
            device.bind(interrupting)
            Interrupting.requests = ()
            assert device.bound
            device.close()


def test_a_node_that_is_not_there_is_told_as_such() -> None:
    with pytest.raises(RequestError, match="CONFIG_VFIO_DEVICE_CDEV") as caught:
        VfioDevice.open("/dev/vfio/devices/vfio99")
    assert caught.value.errno == errno.ENOENT


def test_only_descriptors_of_vfio_devices_are_taken_over() -> None:
    with Memfd.create("ram", 4096) as memfd:
        with pytest.raises(RequestError) as caught:
            VfioDevice.from_fd(memfd.fileno())
        assert caught.value.errno == errno.ENODEV
    with IommuFd() as iommufd, pytest.raises(RequestError):
        VfioDevice.from_fd(iommufd.fileno())
    with pytest.raises(RequestError) as caught:
        VfioDevice.from_fd(1000)
    assert caught.value.errno == errno.EBADF


def test_a_bound_device_is_taken_over_with_its_relations() -> None:
    with IommuFd() as iommufd:
        ioas = iommufd.alloc_ioas()
        device = VfioDevice.open(guest_vfio.edu())
        number = device.bind(iommufd).id
        device.attach(ioas)
        fd = device.detach()
        with VfioDevice.from_fd(fd) as received:
            assert received.bound
            with pytest.raises(VfioError, match="adopt"):
                assert received.iommu_device
            assert received.region(PciRegion.BAR0).read32(guest_vfio.EDU_ID) == guest_vfio.EDU_IS
            known = received.adopt(iommufd, number, attached=ioas)
            assert received.attached is ioas
            assert (known.id, received.iommu_device) == (number, known)
            with pytest.raises(ValueError, match="known already"):
                received.adopt(iommufd, number, attached=None)
            with pytest.raises(IommuError, match=str(ioas)):
                ioas.destroy()
        ioas.destroy()


def test_an_unbound_device_is_taken_over_as_such() -> None:
    device = VfioDevice.open(guest_vfio.edu())
    with VfioDevice.from_fd(device.detach()) as received, IommuFd() as iommufd:
        assert not received.bound
        with pytest.raises(ValueError, match="not"):
            received.adopt(iommufd, 1, attached=None)
        received.bind(iommufd)


def test_a_device_that_is_dropped_is_closed_with_a_warning() -> None:
    with IommuFd() as iommufd, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        device = VfioDevice.open(guest_vfio.edu())
        device.bind(iommufd)
        device.attach(iommufd.alloc_ioas())
        del device
        gc.collect()
        assert [str(one.message) for one in caught if one.category is ResourceWarning]
    with bound(guest_vfio.edu()):
        pass


# Attaching.


def test_a_device_is_attached_replaced_and_detached() -> None:
    with IommuFd() as iommufd, bound(guest_vfio.edu(), iommufd) as device:
        one, other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        chosen = device.attach(one)
        assert chosen not in (one.id, other.id)
        with pytest.raises(IommuError, match=str(one)):
            one.destroy()
        assert device.attach(other) != chosen
        one.destroy()
        assert device.attached is other
        device.detach_pt()
        assert device.attached is None
        device.detach_pt()
        other.destroy()


def test_a_page_table_is_attached_by_its_own_number() -> None:
    with IommuFd() as iommufd, bound(guest_vfio.edu(), iommufd) as device:
        ioas = iommufd.alloc_ioas()
        hwpt = device.iommu_device.alloc_hwpt(ioas)
        assert device.attach(hwpt) == hwpt.id
        assert device.attached is hwpt
        with pytest.raises(IommuError, match=str(hwpt)):
            hwpt.destroy()
        device.detach_pt()
        hwpt.destroy()
        ioas.destroy()


def test_closing_a_device_detaches_it() -> None:
    with IommuFd() as iommufd:
        ioas = iommufd.alloc_ioas()
        with bound(guest_vfio.edu(), iommufd) as device:
            device.attach(ioas)
        ioas.destroy()


def test_an_address_space_of_another_iommufd_is_not_attached() -> None:
    with IommuFd() as iommufd, IommuFd() as elsewhere, bound(guest_vfio.edu(), iommufd) as device:
        elsewhere.alloc_ioas().destroy()
        there = [elsewhere.alloc_ioas() for _ in range(8)][-1]
        with pytest.raises(ValueError, match="lives in another iommufd"):
            device.attach(there)
        assert device.attached is None


def test_an_iommu_without_pasids_refuses_one() -> None:
    with IommuFd() as iommufd, bound(guest_vfio.edu(), iommufd) as device:
        ioas = iommufd.alloc_ioas()
        with pytest.raises(RequestError, match="PASID 7"):
            device.attach(ioas, pasid=7)
        assert device.pasids == {}
        device.detach_pt(pasid=7)
        ioas.destroy()


def test_what_a_device_cannot_reach_is_known_before_it_is_attached() -> None:
    with IommuFd() as iommufd, bound(guest_vfio.edu(), iommufd) as device:
        assert device.reserved_iovas() == (IovaRange(0xFEE00000, 0xFEEFFFFF),)  # for interrupts
        ioas = iommufd.alloc_ioas()
        device.attach(ioas)
        assert not ioas.iova_ranges().allow(IovaRange(0xFEE00000, 0xFEE00FFF))


# Regions.


def test_a_device_says_what_it_has() -> None:
    with bound(guest_vfio.edu()) as device:
        info = device.info()
        assert DeviceFlags.PCI in info.flags
        assert DeviceFlags.RESET not in info.flags
        assert (info.regions, info.irqs) == (9, 5)
        assert {region.info.index: region.info.size for region in device.regions()} == {
            PciRegion.BAR0: 1 << 20,
            PciRegion.CONFIG: 256,
        }
        kinds = {irq.info.index: irq.info.count for irq in device.irqs()}
        expected = {PciIrq.INTX: 1, PciIrq.MSI: 1, PciIrq.REQUEST: 1}
        major, minor = os.uname().release.split(".")[:2]
        if (int(major), int(minor.partition("-")[0])) >= (7, 3):
            expected[PciIrq.ERROR] = 1
        assert kinds == expected
    with bound(guest_vfio.e1000e()) as device:
        assert [irq.info.index for irq in device.irqs()] == list(PciIrq)


def test_every_index_has_a_region_or_a_reason() -> None:
    with bound(guest_vfio.edu()) as device:
        for index in PciRegion:
            if index is PciRegion.VGA:
                with pytest.raises(RequestError, match="no region of this index"):
                    device.region(index)
            else:
                assert device.region(index).info.index == index
        with pytest.raises(RequestError):
            device.region(99)
        with pytest.raises(RequestError, match="no interrupts of this index"):
            device.irq(99)


def test_a_register_reads_the_same_by_call_and_by_mapping() -> None:
    with registers_of_edu() as registers, registers.map() as mapping:
        for access in (registers, mapping):
            assert access.read32(guest_vfio.EDU_ID) == guest_vfio.EDU_IS
            access.write32(guest_vfio.EDU_LIVENESS, 0x12345678)
            for reader in (registers, mapping):
                assert reader.read32(guest_vfio.EDU_LIVENESS) == 0x12345678 ^ 0xFFFFFFFF


def test_an_access_has_exactly_its_width() -> None:
    with registers_of_edu() as registers, registers.map() as mapping:
        for access in (registers, mapping):
            # QEMU answers narrower reads of this register with zeros, and wider ones with ones.
            assert access.read32(guest_vfio.EDU_ID) == guest_vfio.EDU_IS
            assert access.read8(guest_vfio.EDU_ID) == 0
            assert access.read16(guest_vfio.EDU_ID) == 0
            assert access.read64(guest_vfio.EDU_ID) == 0xFFFFFFFF_FFFFFFFF
            # The registers from 0x80 on take 64 bits too.
            access.write64(0x80, 0x123456789AB)
            assert access.read64(0x80) == 0x123456789AB
            assert access.read32(0x80) == 0x456789AB


def test_bytes_are_read_and_written_as_many_as_asked_for() -> None:
    with registers_of_edu() as registers:
        registers.write((0x0123456789ABCDEF).to_bytes(8, "little"), 0x80)
        assert int.from_bytes(registers.read(8, 0x80), "little") == 0x0123456789ABCDEF
        assert len(registers.read(100, 0x80000)) == 100
        assert registers.read(0, 0) == b""


def test_what_is_outside_or_not_aligned_or_too_large_is_refused() -> None:
    size = 1 << 20
    with registers_of_edu() as registers, registers.map() as mapping:
        for access in (registers, mapping):
            for offset in (-4, 2, size - 2, size, size + 4):
                with pytest.raises(ValueError, match=r"bits at|do not lie within"):
                    access.read32(offset)
                with pytest.raises(ValueError, match=r"bits at|do not lie within"):
                    access.write32(offset, 0)
            for value in (-1, 1 << 32):
                with pytest.raises(ValueError, match="does not fit"):
                    access.write32(0, value)
        for offset, length in ((-1, 1), (size, 1), (size - 1, 2), (0, size + 1), (0, -1)):
            with pytest.raises(ValueError, match="do not lie within"):
                registers.read(length, offset)
        with pytest.raises(ValueError, match="do not lie within"):
            registers.write(b"xx", size - 1)


def test_a_mapping_ends_with_its_device() -> None:
    with registers_of_edu() as registers:
        closed, open_until_end = registers.map(), registers.map()
        assert closed.address % 4096 == 0
        closed.close()
        closed.close()
        with pytest.raises(ValueError, match="released"):
            closed.read32(0)
        with pytest.raises(ValueError, match="closed"):
            assert closed.address
    assert open_until_end.closed
    with pytest.raises(ValueError, match="released"):
        open_until_end.read32(0)
    with pytest.raises(ValueError, match="closed"):
        registers.read32(0)
    with bound(guest_vfio.edu()):  # the mapping does not keep the device open
        pass


def test_only_what_can_be_mapped_is_mapped() -> None:
    with bound(guest_vfio.edu()) as device:
        with pytest.raises(ValueError, match="0 areas"):
            device.config.map()
        with pytest.raises(ValueError, match="cannot be mapped, only 0x100000 bytes at 0x0"):
            device.region(PciRegion.BAR0).map(Area(0, 4096))


def test_a_region_with_an_msix_table_is_mapped_around_nothing() -> None:
    with bound(guest_vfio.e1000e()) as device:
        registers, table = device.region(PciRegion.BAR0), device.region(PciRegion.BAR3)
        assert not registers.info.msix_mappable
        assert table.info.msix_mappable
        assert RegionFlags.CAPABILITIES in table.info.flags
        assert table.info.areas == (Area(0, table.info.size),)
        with table.map() as mapping:
            assert mapping.area == table.info.areas[0]


def test_ports_are_reached_by_call_and_cannot_be_mapped() -> None:
    with bound(guest_vfio.e1000e()) as device:
        ports = device.region(PciRegion.BAR2)
        assert ports.info.areas == ()
        ports.write32(0, guest_vfio.E1000E_IVAR)  # selects the register in the window
        ports.write32(4, 0x00080000)
        assert ports.read32(4) == 0x00080000
        assert device.region(PciRegion.BAR0).read32(guest_vfio.E1000E_IVAR) == 0x00080000


def test_an_eventfd_writes_to_a_register() -> None:
    with registers_of_edu() as registers, eventfds(1) as [event]:
        registers.set_ioeventfd(guest_vfio.EDU_LIVENESS, 32, 0x1234, event)
        with pytest.raises(RequestError) as caught:
            registers.set_ioeventfd(guest_vfio.EDU_LIVENESS, 32, 0x1234, event)
        assert caught.value.errno == errno.EEXIST
        registers.write32(guest_vfio.EDU_LIVENESS, 0)
        os.eventfd_write(event, 1)
        wait_for_register(registers.read32, guest_vfio.EDU_LIVENESS, -1, 0x1234 ^ 0xFFFFFFFF)
        registers.set_ioeventfd(guest_vfio.EDU_LIVENESS, 32, 0x1234, None)
        with pytest.raises(RequestError) as caught:
            registers.set_ioeventfd(guest_vfio.EDU_LIVENESS, 32, 0x1234, None)
        assert caught.value.errno == errno.ENODEV
        with pytest.raises(ValueError, match="24 bits"):
            registers.set_ioeventfd(0, 24, 0, event)


# Configuration space.


def test_configuration_space_says_what_the_device_is() -> None:
    with bound(guest_vfio.edu()) as device:
        config, edu = device.config, guest_vfio.edu()
        assert (config.vendor_id, config.device_id) == (edu.vendor_id, edu.device_id)
        assert config.class_code == edu.class_code
        assert config.revision == 0x10
        assert config.subsystem == (0x1AF4, 0x1100)
        assert config.read(4, 0) == bytes([0x34, 0x12, 0xE8, 0x11])
        [bar] = config.bars()
        assert bar == Bar(0, bar.address, io=False, wide=False, prefetchable=False)
        assert bar.address
        [capability] = config.capabilities()
        assert capability.id == PciCapabilityId.MSI
        assert config.capability(PciCapabilityId.MSI) == capability
        assert config.capability(PciCapabilityId.MSIX) is None
        assert config.extended_capabilities() == ()
        with pytest.raises(ValueError, match="64 bits"):
            config.read64(0)


def test_the_capabilities_of_a_pcie_device_are_found() -> None:
    with bound(guest_vfio.e1000e()) as device:
        config = device.config
        assert {one.id for one in config.capabilities()} >= {
            PciCapabilityId.POWER_MANAGEMENT,
            PciCapabilityId.MSI,
            PciCapabilityId.MSIX,
            PciCapabilityId.EXPRESS,
        }
        serial = config.extended_capability(PciExtendedCapabilityId.SERIAL_NUMBER)
        assert serial is not None
        assert config.read16(serial.offset) == PciExtendedCapabilityId.SERIAL_NUMBER
        assert config.extended_capability(PciExtendedCapabilityId.SRIOV) is None
        assert {bar.index: (bar.io, bar.wide) for bar in config.bars()} == {
            0: (False, False),
            1: (False, False),
            2: (True, False),
            3: (False, False),
        }


def test_a_device_may_do_dma_once_it_is_allowed_to() -> None:
    with bound(guest_vfio.edu()) as device:
        config = device.config
        assert Command.BUS_MASTER not in config.command
        assert Command.MEMORY in config.command
        config.set_bus_master(True)
        assert Command.BUS_MASTER | Command.MEMORY in config.command
        config.set_bus_master(False)
        assert Command.BUS_MASTER not in config.command


def test_memory_access_is_not_switched_off_under_a_mapping() -> None:
    with bound(guest_vfio.edu()) as device:
        config, registers = device.config, device.region(PciRegion.BAR0)
        without = config.command & ~Command.MEMORY
        with registers.map(), pytest.raises(RequestError, match="SIGBUS") as caught:
            config.command = without
        assert caught.value.errno == errno.EBUSY
        config.command = without
        with pytest.raises(RequestError, match="command register") as caught:
            registers.read32(guest_vfio.EDU_ID)
        assert caught.value.errno == errno.EIO
        config.command = without | Command.MEMORY
        assert registers.read32(guest_vfio.EDU_ID) == guest_vfio.EDU_IS


# Interrupts.


def test_intx_arrives_and_is_masked_until_it_is_unmasked() -> None:
    with bound(guest_vfio.edu()) as device, eventfds(1) as [event]:
        registers = device.region(PciRegion.BAR0)
        intx = device.irq(PciIrq.INTX)
        assert intx.info.flags == IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
        intx.enable([event])
        registers.write32(guest_vfio.EDU_RAISE, 1)
        assert signalled(event) == 1
        registers.write32(guest_vfio.EDU_RAISE, 2)
        assert signalled_by_now(event, registers) == 0
        intx.unmask()  # the line is still asserted
        assert signalled_by_now(event, registers) == 1
        registers.write32(guest_vfio.EDU_ACKNOWLEDGE, 3)
        intx.unmask()
        assert signalled_by_now(event, registers) == 0
        intx.mask()
        registers.write32(guest_vfio.EDU_RAISE, 1)
        assert signalled_by_now(event, registers) == 0
        intx.unmask()
        assert signalled(event) == 1
        registers.write32(guest_vfio.EDU_ACKNOWLEDGE, 1)
        intx.disable()


def test_intx_is_unmasked_by_an_eventfd() -> None:
    with bound(guest_vfio.edu()) as device, eventfds(2) as [event, unmask]:
        registers = device.region(PciRegion.BAR0)
        intx = device.irq(PciIrq.INTX)
        intx.enable([event])
        intx.set_unmask_eventfd(unmask)
        registers.write32(guest_vfio.EDU_RAISE, 1)
        assert signalled(event) == 1
        os.eventfd_write(unmask, 1)
        assert signalled(event) == 1  # the line is still asserted
        registers.write32(guest_vfio.EDU_ACKNOWLEDGE, 1)
        with pytest.raises(RequestError) as caught:
            intx.set_unmask_eventfd(event)
        assert caught.value.errno == errno.EBUSY
        intx.set_unmask_eventfd(None)
        with pytest.raises(RequestError) as caught:
            intx.set_mask_eventfd(unmask)
        assert caught.value.errno == errno.ENOTTY
        intx.disable()


def test_msi_arrives_once_the_device_may_do_dma() -> None:
    with bound(guest_vfio.edu()) as device, eventfds(1) as [event]:
        registers = device.region(PciRegion.BAR0)
        msi = device.irq(PciIrq.MSI)
        msi.enable([event])
        registers.write32(guest_vfio.EDU_RAISE, 1)
        assert signalled_by_now(event, registers) == 0
        guest_vfio.enable_bus_master(device)
        for time_ in range(1, 4):
            registers.write32(guest_vfio.EDU_RAISE, 1 << time_)
            assert signalled_by_now(event, registers) == 1
        registers.write32(guest_vfio.EDU_ACKNOWLEDGE, 0xFFFFFFFF)
        msi.disable()
        registers.write32(guest_vfio.EDU_RAISE, 1)
        assert signalled_by_now(event, registers) == 0


def test_msi_cannot_be_masked() -> None:
    with bound(guest_vfio.edu()) as device, eventfds(1) as events:
        msi = device.irq(PciIrq.MSI)
        msi.enable(events)
        for refused in (msi.mask, msi.unmask):
            with pytest.raises(RequestError) as caught:
                refused()
            assert caught.value.errno == errno.ENOTTY


def test_one_kind_of_interrupts_is_on_at_a_time() -> None:
    with bound(guest_vfio.edu()) as device, eventfds(1) as events:
        intx, msi = device.irq(PciIrq.INTX), device.irq(PciIrq.MSI)
        intx.enable(events)
        with pytest.raises(RequestError, match="can be enabled at a time") as caught:
            msi.enable(events)
        assert caught.value.errno == errno.EINVAL
        intx.disable()
        msi.enable(events)
        msi.disable()
        with pytest.raises(RequestError):
            msi.disable()


@pytest.mark.parametrize("kind", list(PciIrq))
def test_an_interrupt_of_any_kind_is_triggered_by_software(kind: PciIrq) -> None:
    with bound(guest_vfio.e1000e()) as device, eventfds(1) as [event]:
        irq = device.irq(kind)
        irq.enable([event])
        irq.trigger()
        assert signalled(event) == 1
        irq.trigger_each([False])
        assert signalled(event, 0) == 0
        irq.trigger_each([True])
        assert signalled(event) == 1
        irq.disable()
        with pytest.raises(RequestError):
            irq.trigger()


def test_each_msix_vector_has_an_eventfd_of_its_own() -> None:
    count = guest_vfio.VECTORS_OF_E1000E
    with bound(guest_vfio.e1000e()) as device, eventfds(count + 1) as [*events, other]:
        msix = device.irq(PciIrq.MSIX)
        assert msix.info.count == count
        msix.enable(events)
        msix.trigger_each([True, False, True, False], first=1)
        assert [signalled(event, 0) for event in events] == [0, 1, 0, 1, 0]
        msix.trigger(0, count)
        assert [signalled(event, 0) for event in events] == [1] * count
        msix.set_eventfd(2, None)
        msix.set_eventfd(3, other)
        msix.trigger(0, count)
        assert [signalled(event, 0) for event in events] == [1, 1, 0, 0, 1]
        assert signalled(other, 0) == 1


def test_msix_arrives_from_a_device_that_did_dma() -> None:
    iova = 0x100000
    with (
        Memfd.create("ram", 3 * 4096) as ram,
        IommuFd() as iommufd,
        bound(guest_vfio.nvme(), iommufd) as device,
        eventfds(2) as [event, other],
    ):
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram, iova=iova)
        device.attach(ioas)
        guest_vfio.enable_bus_master(device)
        device.irq(PciIrq.MSIX).enable([event, other])
        guest_vfio.identify_nvme(device, ram, iova)
        assert signalled(event) >= 1
        assert signalled(other, 0) == 0
        assert guest_vfio.read_serial_of_nvme(ram) == guest_vfio.NVME_SERIAL


def test_msix_vectors_are_added_one_by_one() -> None:
    with bound(guest_vfio.e1000e()) as device, eventfds(3) as events:
        msix = device.irq(PciIrq.MSIX)
        assert IrqFlags.NORESIZE not in msix.info.flags
        for vector, event in enumerate(events):
            msix.set_eventfd(vector, event)
        msix.trigger(0, len(events))
        assert [signalled(event, 0) for event in events] == [1] * len(events)


def test_more_vectors_than_the_system_has_are_refused_and_none_stays() -> None:
    count = guest_vfio.VECTORS_OF_NVME
    with bound(guest_vfio.nvme()) as device, eventfds(count) as events:
        msix = device.irq(PciIrq.MSIX)
        assert msix.info.count == count
        with pytest.raises(RequestError, match=f"{count} vectors") as caught:
            msix.enable(events)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(RequestError):
            msix.trigger()
        msix.enable(events[:8])
        msix.trigger(0, 8)
        assert [signalled(event, 0) for event in events[:9]] == [1] * 8 + [0]


def test_vectors_that_are_not_there_are_refused() -> None:
    with bound(guest_vfio.edu()) as device, eventfds(2) as events:
        msi = device.irq(PciIrq.MSI)
        with pytest.raises(ValueError, match="which has 1"):
            msi.enable(events)
        with pytest.raises(ValueError, match="which has 1"):
            msi.set_eventfd(1, events[0])
        for refused in (msi.trigger, msi.mask, msi.unmask):
            for vector in (-1, 1):
                with pytest.raises(ValueError, match="which has 1"):
                    refused(vector)
        with pytest.raises(ValueError, match="no eventfd"):
            msi.enable([])
        with pytest.raises(RequestError), Memfd.create("ram", 4096) as memfd:
            msi.enable([memfd])


def test_the_interrupts_end_with_the_device() -> None:
    with eventfds(1) as [event]:
        with bound(guest_vfio.edu()) as device:
            device.irq(PciIrq.INTX).enable([event])
        with bound(guest_vfio.edu()) as device:
            registers = device.region(PciRegion.BAR0)
            registers.write32(guest_vfio.EDU_RAISE, 1)
            assert signalled_by_now(event, registers) == 0
            device.irq(PciIrq.MSI).enable([event])
            registers.write32(guest_vfio.EDU_ACKNOWLEDGE, 1)


# Resets.


def test_binding_a_device_resets_it() -> None:
    nvme, at = guest_vfio.nvme(), guest_vfio.NVME_CONFIGURATION
    with guest_vfio.mapped_by_sysfs(nvme) as registers, driven(nvme), IommuFd() as iommufd:
        registers[at // 4] = 0x00460000
        with VfioDevice.open(nvme) as device:
            assert registers[at // 4] == 0x00460000
            device.bind(iommufd)
            assert device.region(PciRegion.BAR0).read32(at) == 0


def test_a_reset_clears_the_registers_and_keeps_the_interrupts() -> None:
    with bound(guest_vfio.nvme()) as device, eventfds(1) as [event]:
        assert DeviceFlags.RESET in device.info().flags
        registers = device.region(PciRegion.BAR0)
        device.irq(PciIrq.MSIX).enable([event])
        assert registers.read32(guest_vfio.NVME_CONFIGURATION) == 0
        with registers.map() as mapping:
            mapping.write32(guest_vfio.NVME_CONFIGURATION, 0x00460000)
            assert registers.read32(guest_vfio.NVME_CONFIGURATION) == 0x00460000
            device.reset()
            assert mapping.read32(guest_vfio.NVME_CONFIGURATION) == 0
        device.irq(PciIrq.MSIX).trigger()
        assert signalled(event) == 1


def test_a_device_without_a_reset_says_so() -> None:
    with bound(guest_vfio.edu()) as device:
        with pytest.raises(RequestError, match="hot_reset") as caught:
            device.reset()
        assert caught.value.errno == errno.EINVAL
        for refused in (device.hot_reset, device.hot_reset_info):
            with pytest.raises(RequestError, match="root bus") as caught:
                refused()
            assert caught.value.errno == errno.ENODEV


def test_a_hot_reset_needs_all_that_it_would_reset() -> None:
    one, other = guest_vfio.e1000e(), guest_vfio.nvme()
    with bound(one) as device:
        info = device.hot_reset_info()
        assert [affected.address for affected in info.devices] == [one.address, other.address]
        assert [affected.owned for affected in info.devices] == [True, False]
        assert info.devices[0].id == device.iommu_device.id
        assert not info.possible
        with pytest.raises(RequestError, match="not owned") as caught:
            device.hot_reset()
        assert caught.value.errno == errno.EINVAL


def test_a_hot_reset_resets_all_functions_of_a_slot() -> None:
    with (
        IommuFd() as iommufd,
        bound(guest_vfio.e1000e(), iommufd) as device,
        bound(guest_vfio.nvme(), iommufd) as other,
    ):
        info = device.hot_reset_info()
        assert info.possible
        assert [one.id for one in info.devices] == [
            device.iommu_device.id,
            other.iommu_device.id,
        ]
        registers, others = device.region(PciRegion.BAR0), other.region(PciRegion.BAR0)
        before = registers.read32(guest_vfio.E1000E_VLAN_TYPE)
        registers.write32(guest_vfio.E1000E_VLAN_TYPE, before ^ 1)
        others.write32(guest_vfio.NVME_CONFIGURATION, 0x00460000)
        other.hot_reset()
        assert registers.read32(guest_vfio.E1000E_VLAN_TYPE) == before
        assert others.read32(guest_vfio.NVME_CONFIGURATION) == 0


def test_a_device_of_the_same_group_is_owned_without_being_bound() -> None:
    with driven(guest_vfio.nvme()) as nvme, bound(guest_vfio.e1000e()) as device:
        info = device.hot_reset_info()
        [affected] = [one for one in info.devices if one.address == nvme.address]
        assert affected.owned
        assert affected.id is None
        assert info.possible
        device.hot_reset()


# Features.


def test_a_device_has_the_features_it_says_it_has() -> None:
    with bound(guest_vfio.edu()) as device:
        features = device.features
        low_power = {
            Feature.LOW_POWER_ENTRY,
            Feature.LOW_POWER_ENTRY_WITH_WAKEUP,
            Feature.LOW_POWER_EXIT,
        }
        assert features.supported() == low_power
        assert features.probe(Feature.LOW_POWER_ENTRY, set=True)
        assert not features.probe(Feature.LOW_POWER_ENTRY, get=True)
        assert not features.probe(Feature.LOW_POWER_ENTRY, get=True, set=True)


def test_a_feature_that_is_lacking_is_told_with_its_name() -> None:
    wanted = [IovaRange(0, 0xFFFF)]
    with bound(guest_vfio.edu()) as device:
        refusals: dict[str, Callable[[], object]] = {
            "MIGRATION": device.migration.flags,
            "MIG_DEVICE_STATE": lambda: device.migration.state,
            "MIG_DATA_SIZE": device.migration.data_size,
            "DMA_LOGGING_START": lambda: device.dma_logging.start(wanted, 4096),
            "DMA_LOGGING_STOP": device.dma_logging.stop,
            "DMA_LOGGING_REPORT": lambda: device.dma_logging.report(wanted[0]),
            "BUS_MASTER": lambda: device.features.set_bus_master(True),
            "PCI_VF_TOKEN": lambda: device.features.set_vf_token(uuid.uuid4()),
            "DMA_BUF": lambda: device.features.export_dma_buf(0, [Area(0, 4096)]),
            "ZPCI_ERROR": lambda: device.features.zpci_error(64),
        }
        for name, refused in refusals.items():
            with pytest.raises(FeatureNotSupportedError, match=f"VFIO_DEVICE_FEATURE_{name} on"):
                refused()
        with pytest.raises(FeatureNotSupportedError, match="MIG_DEVICE_STATE"):
            device.migration.set_state(MigrationState.STOP)
        with pytest.raises(RequestError, match="PRE_COPY"):
            device.migration.enable_reinit()


def test_a_device_in_low_power_is_reached_by_call_but_not_by_mapping() -> None:
    with (
        bound(guest_vfio.edu()) as device,
        device.region(PciRegion.BAR0).map() as mapping,
    ):
        registers, low_power = device.region(PciRegion.BAR0), device.low_power
        low_power.enter()
        assert low_power.entered
        with pytest.raises(RequestError):
            low_power.enter()
        assert registers.read32(guest_vfio.EDU_ID) == guest_vfio.EDU_IS
        with pytest.raises(RequestError, match="SIGBUS"):
            mapping.read32(guest_vfio.EDU_ID)
        with pytest.raises(RequestError, match="SIGBUS"):
            mapping.write32(guest_vfio.EDU_LIVENESS, 0)
        assert find_fatal_signal(lambda: mapping._exported.load(0, 32)) == signal.SIGBUS
        low_power.exit()
        low_power.exit()
        assert mapping.read32(guest_vfio.EDU_ID) == guest_vfio.EDU_IS
        with eventfds(1) as [event]:
            low_power.enter(wakeup=event)
            low_power.exit()
        assert not low_power.entered


# Helpers of the tests above.


def find_fatal_signal(action: Callable[[], object]) -> int:
    """Run an action in a child process; return the signal that kills it, or 0."""
    pid = os.fork()
    if not pid:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
