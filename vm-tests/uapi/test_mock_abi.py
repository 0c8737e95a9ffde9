"""Compare what `guest_mock` sends to the kernel's mock device with that kernel's own header.

The header is not part of the uAPI, so its numbers may change with any release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from iommufd import guest_mock

from pyluo.vm import Kernel
from uapi.test_abi import compile_against

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "drivers/iommu/iommufd/iommufd_test.h"
CONSTANTS = {
    "IOMMU_TEST_CMD": guest_mock.IOMMU_TEST_CMD,
    "sizeof(struct iommu_test_cmd)": guest_mock._SIZE,
    "offsetof(struct iommu_test_cmd, add_reserved)": guest_mock._HEADER.size,
    "MOCK_APERTURE_START": guest_mock.FIRST,
    "MOCK_APERTURE_LAST": guest_mock.LAST,
    "MOCK_PAGE_SIZE": guest_mock.PAGE,
    "IOMMU_HW_INFO_TYPE_SELFTEST": guest_mock.HW_INFO,
    "IOMMU_HW_INFO_SELFTEST_REGVAL": guest_mock.HW_INFO_REGISTER,
    "IOMMU_HWPT_DATA_SELFTEST": guest_mock.HWPT_DATA,
    "IOMMU_HWPT_INVALIDATE_DATA_SELFTEST": guest_mock.INVALIDATION,
    "IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST": guest_mock.INVALIDATION,
    "IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID": guest_mock.NO_INVALIDATION,
    "IOMMU_VIOMMU_TYPE_SELFTEST": guest_mock.VIOMMU,
    "IOMMU_VEVENTQ_TYPE_SELFTEST": guest_mock.EVENTS,
    "IOMMU_HW_QUEUE_TYPE_SELFTEST": guest_mock.HW_QUEUE,
    "IOMMU_TEST_HW_QUEUE_MAX": guest_mock.HW_QUEUES,
    "MOCK_NESTED_DOMAIN_IOTLB_NUM": guest_mock.TLB_ENTRIES,
    "IOMMU_TEST_IOTLB_DEFAULT": guest_mock.TLB_VALUE,
    "MOCK_DEV_CACHE_NUM": guest_mock.CACHE_ENTRIES,
    "IOMMU_TEST_DEV_CACHE_DEFAULT": guest_mock.CACHE_VALUE,
    "MOCK_PASID_WIDTH": guest_mock.PASID_BITS,
    "MOCK_FLAGS_DEVICE_NO_DIRTY": guest_mock.MockFlags.NO_DIRTY,
    "MOCK_FLAGS_DEVICE_PASID": guest_mock.MockFlags.PASID,
    "MOCK_ACCESS_RW_WRITE": guest_mock._WRITE,
    "MOCK_FLAGS_ACCESS_WRITE": guest_mock._WRITE,
    "MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES": guest_mock._PINS,
    "sizeof(struct iommu_viommu_event_selftest)": guest_mock._EVENT.size,
}
OPERATIONS = {f"IOMMU_TEST_OP_{op.name}": int(op) for op in guest_mock._Op}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Kernel.find("selftest").source
    assert source is not None
    folder = tmp_path_factory.mktemp("source")
    source.extract([HEADER], folder)
    return folder / HEADER


@pytest.mark.parametrize("off", [0, 1])
def test_the_mock_device_is_spoken_to_as_its_header_says(header: Path, off: int) -> None:
    assertions = {
        name: f'_Static_assert(({name}) == {int(value) + off}, "{name}");'
        for name, value in (CONSTANTS | OPERATIONS).items()
    }
    text = "\n".join([f'#include "{header}"', "#include <stddef.h>", *assertions.values()])
    complaints = compile_against("selftest", text).stderr
    for name in assertions:
        assert (f'"{name}"' in complaints) == bool(off), complaints
