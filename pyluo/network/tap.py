"""Taps: network interfaces whose other end is a descriptor, such as that of a VMM."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, PlainIoctl, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import NotPermittedError, RequestError
from pyluo.network.netlink import connect, off_event_loops, read_data, read_kind
from pyluo.operation import Operation

if TYPE_CHECKING:
    from pyluo.network.state import Attributes, Link

__all__ = ["create_tap", "open_tap"]

_DEVICE = "/dev/net/tun"
_NO_TUN = "The kernel needs CONFIG_TUN, or its module"
_OPEN = Operation(
    f"open {_DEVICE}",
    refusals={errno.EACCES: NotPermittedError, errno.ENOENT: _NO_TUN, errno.ENODEV: _NO_TUN},
)
_SETIFF = Ioctl(
    "TUNSETIFF",
    "ifreq",
    RequestError,
    {
        errno.EPERM: (
            NotPermittedError,
            "Opening a tap needs CAP_NET_ADMIN, or to be its owner or of its group",
        ),
        errno.EBUSY: "Another process has its only queue open",
    },
    size=None,
)
_SETPERSIST = PlainIoctl("TUNSETPERSIST", RequestError)
_SETOWNER = PlainIoctl("TUNSETOWNER", RequestError)
_SETGROUP = PlainIoctl("TUNSETGROUP", RequestError)


@off_event_loops
def open_tap(name: str) -> OwnedFd:
    """Open a queue of a tap that exists.

    The descriptor sends and receives Ethernet frames. It has the tap's own settings: with a header
    of virtio-net before each frame, if the tap was made so. A tap with several queues can be opened
    as many times.

    Args:
        name: the name of the interface.

    Raises:
        NotPermittedError: the caller may not open it (EPERM, EACCES).
        RequestError: there is no interface of this name (ENODEV), or it is no tap (EINVAL); another
            process has it open (EBUSY).

    Source: include/uapi/linux/if_tun.h, TUNSETIFF. Linux 3.8.
    """
    with connect(_SETIFF) as netlink:
        found = [each for each in netlink.get_links() if each.get("ifname") == name]
    if not found:
        raise _SETIFF.error(errno.ENODEV, name, "There is no interface of this name")
    data = read_data(found[0])
    if read_kind(found[0]) != "tun" or data.get("IFLA_TUN_TYPE") != constant("IFF_TAP"):
        raise _SETIFF.error(errno.EINVAL, name, "It is no tap")
    return _attach(name, dict(data["attrs"]))


def create_tap(link: Link) -> None:
    """Create the tap, or the tun, that a record describes; it outlives the descriptor.

    Raises:
        RequestError: as `open_tap`.
    """
    with _attach(link.name, link.data) as file:
        for request, name in ((_SETOWNER, "IFLA_TUN_OWNER"), (_SETGROUP, "IFLA_TUN_GROUP")):
            if name in link.data:
                request(file.fileno(), link.name, link.data[name])
        _SETPERSIST(file.fileno(), link.name, 1)


def _attach(name: str, settings: Attributes) -> OwnedFd:
    """Open a queue of a tap with these settings; create the tap if there is none."""
    flags = settings["IFLA_TUN_TYPE"]
    for setting, flag in (("MULTI_QUEUE", "IFF_MULTI_QUEUE"), ("VNET_HDR", "IFF_VNET_HDR")):
        if settings.get(f"IFLA_TUN_{setting}"):
            flags |= constant(flag)
    if not settings.get("IFLA_TUN_PI"):
        flags |= constant("IFF_NO_PI")
    with _OPEN.raising(name):
        file = OwnedFd(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        # The kernel reads it as unsigned, and IFF_VNET_HDR fits into 15 bits.
        _SETIFF(file.fileno(), name, ifr_name=name.encode(), ifr_flags=flags)
    except BaseException:
        file.close()
        raise
    return file
