"""A device that does DMA through an IOMMU, before, during and after live updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.errors import IommuUnsupportedError, UserMappingError
from pyluo.iommufd import IovaRange
from pyluo.vm import VM
from vfio import guest_dma, guest_edu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

HOPS = 5


@pytest.fixture(scope="module")
def machine(kernel: Kernel) -> Iterator[VM]:
    """A guest with the device; the tests leave it as they found it."""
    with VM(kernel, **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        yield vm


@pytest.fixture
def faultless(kernel: Kernel) -> Iterator[VM]:
    """A guest whose IOMMU has reported nothing so far: of more than three faults within five
    seconds the kernel tells only some."""
    with VM(kernel, **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        yield vm


def test_a_device_reads_a_memfd_and_writes_to_it(machine: VM) -> None:
    assert machine.call(guest_dma.round_trip) == guest_dma.pattern(7)


def test_an_access_outside_the_map_is_stopped_and_reported(faultless: VM) -> None:
    read, kept, faults = faultless.call(guest_dma.outside_the_map)
    assert read == bytes(guest_edu.BUFFER)  # what QEMU's IOMMU gives for a read that it stops
    assert kept == guest_dma.pattern(2)
    unmapped = guest_dma.IOVA + guest_dma.slot(2)
    for direction, iova in (
        ("DMA Write", guest_dma.OUTSIDE),
        ("DMA Read", guest_dma.OUTSIDE),
        ("DMA Write", unmapped),
    ):
        assert any(direction in fault and f"addr {iova:#x} " in fault for fault in faults), faults


def test_a_write_to_what_is_mapped_read_only_is_stopped_and_reported(faultless: VM) -> None:
    kept, faults = faultless.call(guest_dma.write_to_what_is_read_only)
    assert kept == guest_dma.pattern(5)
    assert any(
        "DMA Write" in fault and f"addr {guest_dma.ROM_IOVA:#x} " in fault for fault in faults
    )
    assert not any("DMA Read" in fault for fault in faults)


def test_msi_arrives_on_an_eventfd(machine: VM) -> None:
    assert machine.call(guest_dma.interrupts_by_msi) == (1, 1, 0)


def test_dma_goes_on_while_luo_holds_the_memfd(machine: VM) -> None:
    assert machine.call(guest_dma.dma_while_preserved) == guest_dma.pattern(9)


def test_a_page_table_is_replaced_under_dma_without_a_gap(machine: VM) -> None:
    assert machine.call(guest_dma.replaced_under_dma, 10) == (10, [], [])


def test_ranges_narrow_when_a_device_is_attached_and_widen_again(machine: VM) -> None:
    everything = [IovaRange(0, (1 << 64) - 1)]
    before, meanwhile, after = machine.call(guest_dma.narrowed)
    assert before == after == everything
    # Without the addresses of interrupts, and as wide as the IOMMU's page tables.
    assert meanwhile == [IovaRange(0, 0xFEDFFFFF), IovaRange(0xFEF00000, (1 << 39) - 1)]


def test_a_layout_that_does_not_fit_maps_nothing_and_says_why(machine: VM) -> None:
    said = machine.call(guest_dma.misfits)
    assert "overlaps 0xfee00000..0xfeefffff, reserved for VFIO device 0000:" in said["reserved"]
    assert "0x1000000000000000..0x1000000000000fff is outside 0x0..0x7fffffffff" in said["beyond"]
    assert "is not aligned to 4096 bytes" in said["unaligned"]
    assert "needs 8192 bytes of 'short', which has 4096" in said["short"]
    assert "needs 'nvram', which is missing" in said["missing"]
    assert all("Nothing was mapped" in text for text in said.values())


def test_a_buffer_is_kept_while_a_device_may_write_to_it(machine: VM) -> None:
    assert machine.call(guest_dma.buffer_is_kept_while_a_device_may_write_to_it) == (
        guest_dma.pattern(4)
    )


def test_an_iommufd_is_not_given_up_with_a_buffer_mapped_through_it(machine: VM) -> None:
    with pytest.raises(UserMappingError, match="of IOAS"):
        machine.call(guest_dma.give_up_an_iommufd_with_a_buffer)


def test_what_a_signal_left_in_doubt_is_not_recorded(machine: VM) -> None:
    known, said, known_again = machine.call(guest_dma.signal_while_mapping)
    assert not known
    assert "signal interrupted a request" in said
    assert known_again


def test_dirty_tracking_is_refused_where_the_iommu_has_none(machine: VM) -> None:
    with pytest.raises(IommuUnsupportedError):
        machine.call(guest_dma.ask_for_dirty_tracking)


@pytest.mark.parametrize("name", ["stable", "previous"])
def test_luo_refuses_iommufd_and_vfio_and_says_which_support_is_missing(name: str) -> None:
    """The day a kernel takes one, this turns red: then the manual and `file_kind` want a line."""
    with VM(name, **guest_edu.GUEST) as vm:  # type: ignore[arg-type]
        answers = vm.call(guest_dma.offers)
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
        vm.hold(guest_dma.begin)
        for hop, release in enumerate(releases[1:], start=1):
            vm.live_update(to=release)
            vm.hold(guest_dma.go_on, hop)
            assert vm.call(guest_dma.faults) == []
