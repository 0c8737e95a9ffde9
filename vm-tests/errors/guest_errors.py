"""Each class of exception, raised by the real thing: functions named like the classes.

The guest runs the kernel `selftest`, with the devices of the tests of VFIO, after a live update
that carried over the sessions of `prepare`.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from iommufd.guest_mock import (
    CACHE_ENTRIES,
    VIOMMU,
    MockDevice,
    cache_invalidation,
    opened,
    unprivileged,
)
from vfio import guest_vfio

from pyluo import (
    IncomingSession,
    IoasLayout,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    OutgoingStore,
    RequestError,
    Seal,
    ServiceManager,
    handoff,
    kexec,
)
from pyluo._sys import constant, kexec_file_load
from pyluo.iommufd import HwptFlags, IommuFd
from pyluo.kvm import Kvm
from pyluo.session import _PRESERVE_FD
from pyluo.vfio import Feature, PciDevice, VfioDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 4096
NAMES = ("one", "other")  # of sessions that are carried over
GARBAGE = "/run/no kernel"
PATIENCE = 30.0  # seconds


def prepare() -> list[object]:
    """Create sessions for the next life; they stay open until the jump."""
    with LiveUpdate() as device:
        return [device.create_session(name) for name in NAMES]


def provoke(name: str, image: str) -> str:
    """Return the name of the class of the exception that a function of this module raises.

    Args:
        name: the name of the function.
        image: the path of a kernel's image.
    """
    try:
        PROVOCATIONS[name](image)
    except RequestError as error:
        return type(error).__name__
    return ""


@contextmanager
def hidden(path: str) -> Iterator[None]:
    """Have no such device in the block, as with a kernel that lacks it."""
    os.rename(path, f"{path}.hidden")
    try:
        yield
    finally:
        os.rename(f"{path}.hidden", path)


@contextmanager
def preserved() -> Iterator[tuple[LiveUpdate, Memfd]]:
    with LiveUpdate() as device, Memfd.create("ram", SIZE) as ram:
        session = device.create_session("preserved")
        session.preserve(ram, 1)
        try:
            yield device, ram
        finally:
            session.discard()


def request_error(image: str) -> None:
    Memfd.from_fd(1000)


def not_permitted_error(image: str) -> None:
    with unprivileged():
        LiveUpdate()


def kernel_too_old_error(image: str) -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        try:
            _PRESERVE_FD(session.fileno(), "", b"\1" * 8, fd=0, token=1)
        finally:
            session.discard()


def sealed_error(image: str) -> None:
    with Memfd.create("sealed", SIZE, seals=Seal.GROW) as memfd:
        memfd.resize(2 * SIZE)


def luo_error(image: str) -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        try:
            session.preserve(1000, 1)
        finally:
            session.discard()


def live_update_unavailable_error(image: str) -> None:
    with hidden("/dev/liveupdate"):
        LiveUpdate()


def device_busy_error(image: str) -> None:
    with LiveUpdate():
        LiveUpdate()


def session_exists_error(image: str) -> None:
    with preserved() as (device, _):
        device.create_session("preserved")


def session_name_error(image: str) -> None:
    with LiveUpdate() as device:
        device.create_session("")


def session_not_found_error(image: str) -> None:
    with LiveUpdate() as device:
        device.retrieve_session("never carried over")


def retrieve(name: str) -> IncomingSession:
    with LiveUpdate() as device:
        return device.retrieve_session(name)


def session_retrieved_error(image: str) -> None:
    number = retrieve(NAMES[0]).detach()  # another process could have it as well
    try:
        retrieve(NAMES[0])
    finally:
        os.close(number)


def token_not_found_error(image: str) -> None:
    retrieve(NAMES[1]).retrieve(99, Memfd, size=SIZE)


def token_in_use_error(image: str) -> None:
    with LiveUpdate() as device, Memfd.create("a", SIZE) as a, Memfd.create("b", SIZE) as b:
        session = device.create_session("s")
        try:
            session.preserve(a, 1)
            session.preserve(b, 1)
        finally:
            session.discard()


def already_preserved_error(image: str) -> None:
    with preserved() as (device, ram):
        other = device.create_session("other")
        try:
            other.preserve(ram, 1)
        finally:
            other.discard()


def not_preservable_error(image: str) -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        try:
            session.preserve(os.eventfd(0), 1)
        finally:
            session.discard()


def preserved_memory_error(image: str) -> None:
    with LiveUpdate() as device, Memfd.create("large", 1 << 39) as large:
        session = device.create_session("s")
        try:
            session.preserve(large, 1)
        finally:
            session.discard()


def store_error(image: str) -> None:
    with Memfd.create("a", SIZE) as a, Memfd.create("b", SIZE) as b:
        store = OutgoingStore.create("store", keeper=KeeperChoice.NONE)
        try:
            store.add("ram", a)
            store.add("ram", b)
        finally:
            store.discard()


def keeper_error(image: str) -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        keeper = ServiceManager({"NOTIFY_SOCKET": "/run/nobody listens here"})
        try:
            keeper.keep("s", "session", session)
        finally:
            session.discard()


def kexec_error(image: str) -> None:
    kexec.unload()
    kexec.reboot()


def kvm_error(image: str) -> None:
    with hidden("/dev/kvm"):
        Kvm.open()


def image_rejected_error(image: str) -> None:
    with open(GARBAGE, "w") as file:
        file.write("no kernel" * 1000)
    kexec.load(GARBAGE, cmdline="kho=on liveupdate=on", handover=False)


def kexec_busy_error(image: str) -> None:
    # The kernel holds its lock while it reads an image: it has one that takes long to read.
    large = Path("/run/no image")
    large.touch()
    os.truncate(large, 64 << 20)
    no_image = os.open(large, os.O_RDONLY | os.O_CLOEXEC)
    child = os.fork()
    while not child:
        with suppress(RequestError):
            kexec_file_load(no_image, -1, b"", constant("KEXEC_FILE_NO_INITRAMFS"), "")
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            kexec.load(image, cmdline="kho=on liveupdate=on")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(no_image)
        large.unlink()
        kexec.unload()


def handover_error(image: str) -> None:
    kexec.load(image, cmdline="kho=on liveupdate=off")


def handoff_error(image: str) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    with here:
        handoff.receive(here)


def iommu_error(image: str) -> None:
    with IommuFd() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        for _ in range(2):
            ioas.map_file(ram, iova=0)


def iommu_unavailable_error(image: str) -> None:
    with hidden("/dev/iommu"):
        IommuFd()


def iommu_unsupported_error(image: str) -> None:
    with opened() as iommufd:
        MockDevice(iommufd, iommufd.alloc_ioas()).device.hw_info(1)


def user_mapping_error(image: str) -> None:
    with IommuFd() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        mapping = (ioas := iommufd.alloc_ioas()).map(buffer)
        try:
            iommufd.detach()
        finally:
            ioas.unmap(mapping)


def ioas_layout_error(image: str) -> None:
    IoasLayout.from_json("no layout")


def invalidation_error(image: str) -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        device = MockDevice(iommufd, ioas).device
        parent = device.alloc_hwpt(ioas, flags=HwptFlags.NEST_PARENT)
        viommu = device.alloc_viommu(VIOMMU, parent)
        viommu.invalidate([cache_invalidation(7, CACHE_ENTRIES)])


def vfio_error(image: str) -> None:
    with VfioDevice.open(guest_vfio.edu()) as device:
        device.reset()


def device_in_use_error(image: str) -> None:
    with guest_vfio.bound(guest_vfio.edu()):
        guest_vfio.edu().unbind_driver()


def driver_not_found_error(image: str) -> None:
    guest_vfio.random_numbers().bind_driver("no-such-driver")


def feature_not_supported_error(image: str) -> None:
    with guest_vfio.bound(guest_vfio.edu()) as device:
        device.features.get(Feature.MIGRATION, bytes(8))


def pci_device_not_found_error(image: str) -> None:
    PciDevice.at("0000:00:1e.7")


PROVOCATIONS: dict[str, Callable[[str], None]] = {
    "".join(part.capitalize() for part in name.split("_")): function
    for name, function in list(globals().items())
    if name.endswith("_error")
}
