"""`announce`: tell the neighbours that this host has its addresses."""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from typing import TYPE_CHECKING

from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_DADFAILED, IFA_F_TENTATIVE
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_NOARP, IFF_UP

from pyluo.errors import RequestError
from pyluo.network.netlink import connect, off_event_loops
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["announce", "announce_interfaces"]

_ANNOUNCE = Operation("announce addresses")
_POLL = 0.1  # seconds
_SILENT = IFF_LOOPBACK | IFF_NOARP  # interfaces without neighbours
_TENTATIVE = IFA_F_TENTATIVE | IFA_F_DADFAILED
_ETHERTYPE_ARP = 0x0806
_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")  # RFC 826
_ARP_REQUEST = 1
_BROADCAST = b"\xff" * 6
_ADVERTISEMENT = struct.Struct("!BBHI16sBB6s")  # RFC 4861, 4.4 and 4.6.1
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 1 << 29
_TARGET_LINK_LAYER_ADDRESS = 2
_ALL_NODES = "ff02::1"
_HOP_LIMIT = 255


@off_event_loops
def announce(names: Sequence[str] | None = None, *, wait: float = 0.0) -> None:
    """Send gratuitous ARP, and unsolicited neighbour advertisements, for all addresses.

    Whoever hears them sends to this host again at once. Interfaces that are down, or have no
    neighbours, are passed over. What is sent by hardware without a carrier is lost.

    Args:
        names: the names of the interfaces; None for all.
        wait: for how many seconds to wait for carriers, which hardware has a while after it was
            brought up: each interface is announced again when it has one.

    Raises:
        ExceptionGroup: of a RequestError for each address that cannot be announced: the caller may
            not send such packets, without CAP_NET_RAW (EPERM).

    Source: RFC 5227, 3; RFC 4861, 7.2.6
    """
    chosen = [name for _, name in socket.if_nameindex()] if names is None else names
    pending = {name for name in chosen if not _has_carrier(name)}
    announce_interfaces([index for name in chosen if (index := _find(name))])
    until = time.monotonic() + wait
    while pending and time.monotonic() < until:
        time.sleep(_POLL)  # an interface without a driver that tells of its carrier has one
        came = {name for name in pending if _has_carrier(name)}
        announce_interfaces([index for name in came if (index := _find(name))])
        pending -= came


def announce_interfaces(indexes: Sequence[int]) -> None:
    """Announce the addresses of interfaces, as `announce` does.

    Args:
        indexes: the indexes of the interfaces.

    Raises:
        ExceptionGroup: as `announce`.
    """
    failures: list[RequestError] = []
    with connect(_ANNOUNCE) as netlink:
        links = {link["index"]: link for link in netlink.get_links()}
        addresses = list(netlink.get_addr())
    for message in addresses:
        link = links.get(message["index"])
        # A tentative one is announced by the kernel, once nobody else turns out to have it.
        if (
            link is None
            or message["index"] not in indexes
            or message.get("IFA_FLAGS", 0) & _TENTATIVE
        ):
            continue
        hardware = bytes.fromhex((link.get("IFLA_ADDRESS") or "").replace(":", ""))
        if not link["flags"] & IFF_UP or link["flags"] & _SILENT or len(hardware) != 6:
            continue
        address = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
        try:
            with _ANNOUNCE.raising(f"{address} of {link.get('ifname')}"):
                if message["family"] == socket.AF_INET:
                    _send_arp(link.get("ifname"), hardware, address)
                else:
                    _send_advertisement(link["index"], hardware, address)
        except RequestError as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup("not all addresses could be announced", failures)


def _find(name: str) -> int:
    """Return the index of an interface; 0 if there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _has_carrier(name: str) -> bool:
    """Return whether an interface has a carrier, or is down or gone."""
    try:
        with open(f"/sys/class/net/{name}/carrier") as file:
            return file.read().strip() == "1"
    except OSError:
        return True


def _send_arp(name: str, hardware: bytes, text: str) -> None:
    address = socket.inet_aton(text)
    head = _ETHERNET.pack(_BROADCAST, hardware, _ETHERTYPE_ARP)
    packet = _ARP.pack(
        1, 0x0800, 6, 4, _ARP_REQUEST, hardware, address, bytes(6), address
    )  # Ethernet and IPv4
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind((name, _ETHERTYPE_ARP))
        raw.send(head + packet)


def _send_advertisement(index: int, hardware: bytes, text: str) -> None:
    address = ipaddress.IPv6Address(text).packed
    packet = _ADVERTISEMENT.pack(
        _NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE, address, _TARGET_LINK_LAYER_ADDRESS, 1, hardware
    )  # the kernel fills in the checksum
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, _HOP_LIMIT)
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        raw.bind((text, 0, 0, index))
        raw.sendto(packet, (_ALL_NODES, 0, 0, index))
