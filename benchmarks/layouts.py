"""Measure what the layout of an I/O address space takes that has many mappings.

Each mapping is a page of one memfd. `rebuild` maps them, `record` describes them, `adopt` takes
them over as the successor of a process does while nobody drives the device, and `unmap` unmaps them
one by one. The floor asks the kernel for each mapping whether it is there, as `adopt` does, and
does nothing else. All run in one guest, in turns. For each of these, an exponent is fitted to the
times of several numbers of mappings: 1 is linear.
"""

from __future__ import annotations

import json
import os
import statistics
import time

from rich.console import Console
from rich.table import Table

from benchmarks import curves
from pyluo import IoasLayout, Memfd
from pyluo.iommu_layout import NamedMapping
from pyluo.iommufd import Access, IommuFd
from pyluo.vm import VM

COUNTS = (500, 1000, 2000, 4000)
PAGE = 4096


def main() -> None:
    arguments = curves.parse(__doc__, COUNTS)
    with VM(arguments.kernel, call_timeout=600) as vm:
        measured = curves.measure("layouts", arguments, lambda count: vm.call(use_layout, count))
    if arguments.json:
        print(json.dumps(measured))
    else:
        show(measured)


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


def show(measured: dict[str, dict[str, list[float]]]) -> None:
    """Print a table with the medians, as multiples of the floor's, and the exponents."""
    counts = list(measured["floor"])
    floor = {count: statistics.median(measured["floor"][count]) for count in counts}
    table = Table("", *(f"{count} mappings" for count in counts), "exponent", box=None)
    for what, by_count in measured.items():
        medians = {count: statistics.median(by_count[count]) for count in counts}
        cells = [
            f"{medians[count] * 1000:.0f} ms ({medians[count] / floor[count]:.1f})"
            for count in counts
        ]
        table.add_row(what, *cells, f"{curves.fit_exponent(by_count):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
