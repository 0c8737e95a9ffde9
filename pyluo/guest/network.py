"""The network of a guest that has a network interface."""

from __future__ import annotations

import errno
from pathlib import Path

from pyroute2 import IPRoute

__all__ = ["bring_up"]

# QEMU's user network: .2 is the gateway, and .15 is the first address that its DHCP server leases.
_ADDRESS, _PREFIX, _GATEWAY = "10.0.2.15", 24, "10.0.2.2"


def bring_up() -> None:
    """Bring up the loopback and the virtio interface, with the address and route for QEMU.

    Raises:
        OSError: the kernel has no driver for the interface.
    """
    names = [path.name for path in Path("/sys/class/net").glob("*") if (path / "device").exists()]
    if not names:
        raise OSError(errno.ENODEV, "the kernel has no interface: it needs CONFIG_VIRTIO_NET=y")
    hardware = names[0]
    with IPRoute() as netlink:
        for name in ("lo", hardware):
            (index,) = netlink.link_lookup(ifname=name)
            netlink.link("set", index=index, state="up")
        netlink.addr("add", index=index, address=_ADDRESS, prefixlen=_PREFIX)
        netlink.route("add", dst="default", gateway=_GATEWAY)
