"""The ends of a machine in all orders, while its device writes to memory mapped by its address.

Nobody may be able to free the memory while the device can still write to it. The test has the
memory in an arena that stays: what could be freed gets a canary, in which a write would show.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import socket
import threading
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pyluo import IommuError, Memfd, UserMappingError, handoff
from pyluo.iommufd import IommuFd
from pyluo.vfio import VfioDevice
from vfio.guest_dma import IOVA, OUTSIDE, PAGE, SIZE, pattern, read_faults
from vfio.guest_edu import BUFFER, Edu

if TYPE_CHECKING:
    from collections.abc import Callable

_CANARY = b"\xca" * PAGE
_TIMEOUT = 30.0  # seconds


class Driver:
    """A thread that makes the device write to one IOVA, all the time.

    It has a descriptor of its own, so that the device goes on whoever closes another one.

    Args:
        device: the descriptor of the device, bound and attached.
        iova: where the device writes.
    """

    def __init__(self, device: int, iova: int) -> None:
        self._device = VfioDevice.from_fd(os.dup(device))
        self._edu = Edu(self._device, None)  # type: ignore[arg-type]
        self._iova = iova
        self._stopped = False
        self._writes = 0
        self._thread = threading.Thread(target=self._drive, daemon=True)
        self._thread.start()

    def _drive(self) -> None:
        self._edu.wait()  # for what another process has started
        while not self._stopped:
            self._edu.store(self._iova)
            self._writes += 1

    def wait_for_a_write(self) -> None:
        """Wait until the device has written once more, from the beginning of the transfer on."""
        wanted = self._writes + 2
        deadline = time.monotonic() + _TIMEOUT
        while self._writes < wanted:
            assert self._thread.is_alive(), "the driver died"
            assert time.monotonic() < deadline, "the device does not write"
            time.sleep(0.005)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()
        self._device.close()


class Scene:
    """A device that writes to memory of this process, of whose iommufd others have a descriptor.

    Attributes:
        given_back: whether the process could free the memory.
    """

    def __init__(self) -> None:
        self.iommufd = IommuFd()
        self.ioas = self.iommufd.alloc_ioas()
        self.arena = mmap.mmap(-1, PAGE)
        self.view = memoryview(self.arena)
        self.ioas.map(self.view, iova=OUTSIDE)
        ram = Memfd.create("ram", SIZE)
        self.ioas.map_file(ram, iova=IOVA)
        edu = Edu.open(self.iommufd, self.ioas)
        ram.write(pattern(1), 0)
        edu.load(IOVA)
        ram.close()
        self.device = edu.device
        self.elsewhere = os.dup(self.iommufd.fileno())
        self.given_back = False
        self.driver = Driver(self.device.fileno(), OUTSIDE)
        while self.arena[:BUFFER] != pattern(1):
            time.sleep(0.005)

    def try_to_free(self) -> None:
        if not self.given_back:
            with suppress(BufferError):
                self.view.release()
                self.given_back = True
                self.arena[:] = _CANARY

    def close(self) -> None:
        self.driver.stop()
        with suppress(OSError):
            os.close(self.elsewhere)
        self.__dict__.clear()


def _detach_device(scene: Scene) -> None:
    os.close(scene.device.detach())  # the driver has another descriptor


def _close_device(scene: Scene) -> None:
    scene.device.close()


def _close_iommufd(scene: Scene) -> None:
    scene.iommufd.close()


def _drop_iommufd(scene: Scene) -> None:
    del scene.iommufd
    del scene.ioas


def _give_iommufd_away(scene: Scene) -> None:
    """Try to send and to detach the iommufd, which is refused as long as memory is mapped."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for iommufd in (scene.iommufd, scene.iommufd.fileno()):
            with pytest.raises(UserMappingError, match="unmap it"):
                handoff.send(ours, {"iommufd": iommufd}, timeout=1)
    with pytest.raises(UserMappingError, match="unmap it"):
        handoff.exec_with(["true"], {"iommufd": scene.iommufd})
    with pytest.raises(UserMappingError, match="unmap it"):
        scene.iommufd.detach()


def _destroy_ioas(scene: Scene) -> None:
    with suppress(IommuError):
        scene.ioas.destroy()


def _close_in_a_child(scene: Scene) -> None:
    """Close the copies of the objects in a child, which must not unmap its parent's memory."""
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            scene.iommufd.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert scene.ioas.maps(scene.ioas.own_memory[0])


OF_DEVICE: dict[str, Callable[[Scene], None]] = {
    "detach the device": _detach_device,
    "close the device": _close_device,
}
OF_IOMMUFD: dict[str, Callable[[Scene], None]] = {
    "close the iommufd": _close_iommufd,
    "drop the iommufd": _drop_iommufd,
}
OTHERS: dict[str, Callable[[Scene], None]] = {
    "give the iommufd away": _give_iommufd_away,
    "destroy the IOAS": _destroy_ioas,
    "close in a child": _close_in_a_child,
}
_STEPS = OF_DEVICE | OF_IOMMUFD | OTHERS


def try_orders(of_device: str, of_iommufd: str) -> None:
    """Try every order of two ends, with and without another step; check the memory after each.

    The other steps need the iommufd, and so come before its end.
    """
    before = len(read_faults())
    orders = list(itertools.permutations((of_device, of_iommufd)))
    for other in OTHERS:
        for order in itertools.permutations((of_device, of_iommufd, other)):
            if order.index(other) < order.index(of_iommufd):
                orders.append(order)
    for order in orders:
        _try_order(order)
    # The kernel logs a few faults every five seconds.
    assert len(read_faults()) > before, "the device wrote to nothing that was unmapped"


def _try_order(order: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the iommufd that is dropped
        scene = Scene()
        try:
            for step in order:
                _STEPS[step](scene)
                gc.collect()
                scene.try_to_free()
            assert scene.given_back, f"{order}: the memory can never be freed"
            scene.driver.wait_for_a_write()
            assert scene.arena[:] == _CANARY, f"{order}: the device wrote to freed memory"
        finally:
            scene.close()


def exit_under_dma() -> None:
    """Let a process end whose memory a device writes to, and look into all memory that is free."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        try:
            scene = Scene()
            socket.send_fds(theirs, [b"device"], [scene.device.fileno(), scene.elsewhere])
        finally:
            os._exit(0)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 100, 2)
    os.waitpid(pid, 0)
    device, iommufd = fds
    driver = Driver(device, OUTSIDE)
    free = _read_free_memory() - (64 << 20)
    with mmap.mmap(-1, free) as taken:
        for offset in range(0, free, 1 << 20):
            taken[offset : offset + (1 << 20)] = _CANARY * ((1 << 20) // PAGE)
        driver.wait_for_a_write()
        chunks = (taken[offset : offset + (1 << 20)] for offset in range(0, free, 1 << 20))
        assert all(chunk.count(b"\xca") == len(chunk) for chunk in chunks)
    driver.stop()
    ours.close()
    os.close(device)
    os.close(iommufd)


def _read_free_memory() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemFree"].split()[0]) << 10 & ~((1 << 20) - 1)
