"""The network of a guest that was given one."""

from __future__ import annotations

from pathlib import Path

from pyroute2 import IPRoute

__all__ = ["bring_up"]

# QEMU's user network: the host is .2, the first address it leases is .15.
_ADDRESS, _PREFIX, _GATEWAY = "10.0.2.15", 24, "10.0.2.2"


def bring_up() -> None:
    """Bring up the loopback, and the interface of the virtio device with QEMU's addresses."""
    hardware = next(
        path.name for path in Path("/sys/class/net").iterdir() if (path / "device").exists()
    )
    with IPRoute() as netlink:
        for name in ("lo", hardware):
            (index,) = netlink.link_lookup(ifname=name)
            netlink.link("set", index=index, state="up")
        netlink.addr("add", index=index, address=_ADDRESS, prefixlen=_PREFIX)
        netlink.route("add", dst="default", gateway=_GATEWAY)
