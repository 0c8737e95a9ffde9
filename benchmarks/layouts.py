"""What the layout of an I/O address space takes that has many mappings.

Each mapping is a page of one memfd. `rebuild` maps them, `record` describes them, `adopt` takes
them over as the successor of a process does while nobody drives the device, and `unmap` unmaps them
one by one. The floor asks the kernel for each mapping whether it is there, as `adopt` does, and
does nothing else.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from benchmarks.guests import patient_vm
from pyluo import IoasLayout, Memfd
from pyluo.iommu_layout import NamedMapping
from pyluo.iommufd import Access, IommuFd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.carried import Points

__all__ = ["mappings"]

PAGE = 4096


def mappings(kernel: str, sizes: Sequence[int], rounds: int) -> Points:
    """Use layouts of several sizes in one guest."""
    with patient_vm(kernel) as vm:
        for _ in range(rounds):
            for size in sizes:
                yield size, vm.call(use_layout, size)


# What runs in the guest:


def use_layout(count: int) -> dict[str, float]:
    """Use a layout of `count` mappings, in the guest; return the seconds that each step took."""
    access = Access.READ | Access.WRITE
    mappings = [
        NamedMapping(2 * number * PAGE, PAGE, access, "ram", number * PAGE)
        for number in range(count)
    ]
    seen: dict[str, float] = {}
    with IommuFd() as iommufd, Memfd.create("ram", count * PAGE) as ram:
        files = {"ram": ram}
        layout = IoasLayout(tuple(mappings))
        began = time.perf_counter()
        ioas = layout.rebuild(iommufd, files).ioas
        seen["rebuild"] = time.perf_counter() - began
        began = time.perf_counter()
        recorded = IoasLayout.record(ioas, files)
        seen["record"] = time.perf_counter() - began
        assert recorded == layout
        began = time.perf_counter()
        assert all(ioas.maps(mapping.range) for mapping in mappings)
        seen["floor"] = time.perf_counter() - began
        with IommuFd.from_fd(os.dup(iommufd.fileno())) as successor:
            began = time.perf_counter()
            adopted = layout.adopt(successor, ioas.id, files)
            seen["adopt"] = time.perf_counter() - began
            assert adopted.mappings == ioas.mappings
        began = time.perf_counter()
        for mapping in ioas.mappings:
            ioas.unmap(mapping)
        seen["unmap"] = time.perf_counter() - began
    return seen
