"""5,000 mappings of a file of 2 MiB for a device's DMA, by pyluo and by the same ioctls from C."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent / "vm-tests"))

from vfio import guest_edu

from benchmarks.floors import compile_floor
from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair

if TYPE_CHECKING:
    from benchmarks.ratios import Pairs

__all__ = ["dma_map_ratio"]

COUNT = 5000
SIZE = 2 << 20  # bytes
FIRST = 1 << 32  # the lowest IOVA: the interrupts of a PC have theirs below


def dma_map_ratio(kernel: str, rounds: int) -> Pairs:
    """Map and unmap them in the address space of a device behind an emulated IOMMU."""
    floor = compile_floor("dma")
    with patient_vm(kernel, devices=guest_edu.DEVICES, append=guest_edu.APPEND) as vm:
        for _ in range(rounds):
            yield Pair(*vm.call(map_and_unmap, floor, COUNT))


# What runs in the guest:


def map_and_unmap(floor: Path, count: int) -> tuple[float, float]:
    """Map and unmap a file, and have the floor do the same; return the seconds of each."""
    edu, ioas, ram = guest_edu.open_with_ram(SIZE, 0)
    os.posix_fallocate(ram.fileno(), 0, SIZE)
    try:
        began = time.perf_counter()
        mappings = [ioas.map_file(ram, iova=FIRST + number * SIZE) for number in range(count)]
        for mapping in mappings:
            ioas.unmap(mapping)
        seconds = time.perf_counter() - began
        fds = [ioas.iommufd.fileno(), ram.fileno()]
        arguments = (fds[0], ioas.id, fds[1], SIZE, FIRST, count)
        done = subprocess.run(
            [floor, *map(str, arguments)], pass_fds=fds, capture_output=True, check=True
        )
        return seconds, float(done.stdout)
    finally:
        edu.close()
        ioas.iommufd.close()
        ram.close()
