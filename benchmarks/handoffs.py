"""The pause of a handoff of 1,000 mappings to a process that waits at a socket, and that in C.

The pause lasts from the last moment in which the first process could have driven the device until
the memory is accounted to its successor, which knows all mappings by then.
"""

from __future__ import annotations

import json
import os
import socket
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
from pyluo import IoasLayout, Memfd, handoff
from pyluo.iommufd import IommuFd
from pyluo.vfio import VfioDevice

if TYPE_CHECKING:
    from benchmarks.ratios import Pairs
    from pyluo import OwnedFd

__all__ = ["handoff_ratio"]

COUNT = 1000
PAGE = 4096
STRIDE = 2 * PAGE  # the mappings are not adjacent: each is one of its own


def handoff_ratio(kernel: str, rounds: int) -> Pairs:
    """Hand a device behind an emulated IOMMU over, again and again."""
    floor = compile_floor("handoff")
    with patient_vm(kernel, devices=guest_edu.DEVICES, append=guest_edu.APPEND) as vm:
        for _ in range(rounds):
            yield Pair(*vm.call(hand_over, floor, COUNT))


# What runs in the guest:


def hand_over(floor: Path, count: int) -> tuple[float, float]:
    """Hand a device with its memory over, and have the floor do the same; return both pauses."""
    edu, ioas, ram = guest_edu.open_with_ram(PAGE, 0)
    iommufd = ioas.iommufd
    try:
        for number in range(1, count + 1):
            ioas.map_file(ram, iova=number * STRIDE)
        state = {
            "layout": IoasLayout.record(ioas, {"ram": ram}).as_json(),
            "ioas": ioas.id,
            "device": edu.device.iommu_device.id,
        }
        files: dict[str, OwnedFd] = {"iommufd": iommufd, "device": edu.device, "ram": ram}
        seconds = _hand_over(files, json.dumps(state).encode())
        iommufd.change_process()  # back to this one
        fds = [file.fileno() for file in files.values()]
        arguments = (*fds, ioas.id, PAGE, STRIDE, count)
        done = subprocess.run(
            [floor, *map(str, arguments)], pass_fds=fds, capture_output=True, check=True
        )
        return seconds, float(done.stdout)
    finally:
        edu.close()
        iommufd.close()
        ram.close()


def _hand_over(files: dict[str, OwnedFd], state: bytes) -> float:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    call = "import sys; from benchmarks import handoffs; handoffs.succeed(int(sys.argv[1]))"
    with ours, theirs:
        successor = subprocess.Popen(
            [sys.executable, "-c", call, str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
        )
        theirs.close()
        assert ours.recv(100) == b"ready"
        left = time.monotonic()
        handoff.send(ours, files, state)
        output, _ = successor.communicate()
    return float(output) - left


def succeed(number: int) -> None:
    """Run the successor at the other end of a socket; print when it had taken everything over."""
    with socket.socket(fileno=number) as theirs:
        theirs.send(b"ready")
        with handoff.receive(theirs) as given:
            iommufd = given.take("iommufd", IommuFd)
            device = given.take("device", VfioDevice)
            ram = given.take("ram", Memfd)
            state = json.loads(given.state)
    ioas = IoasLayout.from_json(state["layout"]).adopt(iommufd, state["ioas"], {"ram": ram})
    device.adopt(iommufd, state["device"], attached=ioas)
    iommufd.change_process()
    print(time.monotonic())
    for each in (device, iommufd, ram):
        each.close()
