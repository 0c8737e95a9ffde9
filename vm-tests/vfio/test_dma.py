"""Tests of a device that does DMA through an IOMMU, before, during and after live updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.errors import IommuUnsupportedError
from pyluo.iommufd import IovaRange
from pyluo.vm import VM
from vfio import guest_dma, guest_edu, guest_given_back

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

HOPS = 5


@pytest.fixture(scope="module")
def machine(kernel: Kernel) -> Iterator[VM]:
    """A guest with the device; each test leaves it unchanged."""
    with VM(kernel, **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        yield vm


@pytest.fixture
def faultless(kernel: Kernel) -> Iterator[VM]:
    """A guest of its own, as the kernel logs no more than three faults within five seconds."""
    with VM(kernel, **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        yield vm


def test_a_device_reads_a_memfd_and_writes_to_it(machine: VM) -> None:
    assert machine.call(guest_dma.round_trip) == guest_dma.pattern(7)


def test_an_access_outside_the_map_is_stopped_and_reported(faultless: VM) -> None:
    read, ram, faults = faultless.call(guest_dma.access_outside_map)
    assert read == bytes(guest_edu.BUFFER)  # QEMU's IOMMU answers a read that it stops with zeros
    assert ram == guest_dma.pattern(2)
    unmapped = guest_dma.IOVA + guest_dma.slot(2)
    for direction, iova in (
        ("DMA Write", guest_dma.OUTSIDE),
        ("DMA Read", guest_dma.OUTSIDE),
        ("DMA Write", unmapped),
    ):
        assert any(direction in fault and f"addr {iova:#x} " in fault for fault in faults), faults


def test_a_write_to_what_is_mapped_read_only_is_stopped_and_reported(faultless: VM) -> None:
    rom, faults = faultless.call(guest_dma.write_to_read_only)
    assert rom == guest_dma.pattern(5)
    assert any(
        "DMA Write" in fault and f"addr {guest_dma.ROM_IOVA:#x} " in fault for fault in faults
    )
    assert not any("DMA Read" in fault for fault in faults)


def test_msi_arrives_on_an_eventfd(machine: VM) -> None:
    assert machine.call(guest_dma.count_msi_interrupts) == (1, 1, 0)


def test_dma_goes_on_while_luo_holds_the_memfd(machine: VM) -> None:
    assert machine.call(guest_dma.dma_while_preserved) == guest_dma.pattern(9)


def test_a_page_table_is_replaced_under_dma_without_a_gap(machine: VM) -> None:
    assert machine.call(guest_dma.replace_page_table_under_dma, 10) == (10, [], [])


def test_ranges_narrow_when_a_device_is_attached_and_widen_again(machine: VM) -> None:
    everything = [IovaRange(0, (1 << 64) - 1)]
    before, meanwhile, after = machine.call(guest_dma.read_ranges_around_attachment)
    assert before == after == everything
    # All that the IOMMU's page tables can map, except the addresses of interrupts.
    assert meanwhile == [IovaRange(0, 0xFEDFFFFF), IovaRange(0xFEF00000, (1 << 39) - 1)]


def test_a_layout_that_does_not_fit_maps_nothing_and_says_why(machine: VM) -> None:
    refusals = machine.call(guest_dma.rebuild_layouts_that_do_not_fit)
    assert "overlaps 0xfee00000..0xfeefffff, reserved for VFIO device 0000:" in refusals["reserved"]
    assert (
        "0x1000000000000000..0x1000000000000fff is outside 0x0..0x7fffffffff" in refusals["beyond"]
    )
    assert "is not aligned to 4096 bytes" in refusals["unaligned"]
    assert "needs 8192 bytes of 'short', which has 4096" in refusals["short"]
    assert "needs 'nvram', which is missing" in refusals["missing"]
    assert all("Nothing was mapped" in text for text in refusals.values())


@pytest.mark.parametrize("of_device", guest_given_back.OF_DEVICE)
@pytest.mark.parametrize("of_iommufd", guest_given_back.OF_IOMMUFD)
def test_no_order_of_ends_lets_a_device_write_to_memory_that_was_given_back(
    machine: VM, of_device: str, of_iommufd: str
) -> None:
    machine.call(guest_given_back.try_orders, of_device, of_iommufd)


def test_memory_of_a_process_that_is_gone_is_not_given_back_under_a_device(machine: VM) -> None:
    machine.call(guest_given_back.exit_under_dma)


def test_what_a_signal_interrupts_is_known_all_the_same(machine: VM) -> None:
    assert machine.call(guest_dma.signal_while_mapping) > 0


def test_dirty_tracking_is_refused_where_the_iommu_has_none(machine: VM) -> None:
    with pytest.raises(IommuUnsupportedError):
        machine.call(guest_dma.ask_for_dirty_tracking)


@pytest.mark.parametrize("name", ["stable", "previous"])
def test_luo_refuses_iommufd_and_vfio_and_says_which_support_is_missing(name: str) -> None:
    """If it fails because a kernel preserves one, add a line to the manual and to `file_kind`."""
    with VM(name, **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        answers = vm.call(guest_dma.offer_iommufd_and_vfio)
    assert set(answers) == {"IommuFd", "VfioDevice"}
    for kind, text in answers.items():
        missing = "iommufd" if kind == "IommuFd" else "VFIO devices (vfio-pci)"
        assert f"it has no live update handler for {missing}" in text
        assert "IoasLayout" in text


@pytest.mark.parametrize(
    "releases",
    [["stable"] * (HOPS + 1), ["previous", "stable"] * (HOPS // 2 + 1)],
    ids=["stable", "previous and stable in turns"],
)
def test_dma_of_the_next_kernel_sees_what_dma_of_the_old_ones_wrote(releases: list[str]) -> None:
    with VM(releases[0], **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        vm.hold(guest_dma.preserve_machine)
        for hop, release in enumerate(releases[1:], start=1):
            vm.live_update(to=release)
            vm.hold(guest_dma.restore_machine, hop)
            assert vm.call(guest_dma.read_faults) == []
