"""`announce`: tell the neighbours that this host has its addresses."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import TYPE_CHECKING

from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_TENTATIVE
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_NOARP, IFF_UP

from pyluo.network.netlink import connect, off_event_loops
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["announce"]

_ANNOUNCE = Operation("announce addresses")
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
def announce(names: Sequence[str]) -> None:
    """Send gratuitous ARP, and unsolicited neighbour advertisements, for all addresses.

    Interfaces that are down, or have no neighbours, are passed over.

    Args:
        names: the names of the interfaces.

    Raises:
        RequestError: the caller may not send such packets, without CAP_NET_RAW (EPERM).

    Source: RFC 5227, 3; RFC 4861, 7.2.6
    """
    with connect(_ANNOUNCE) as netlink:
        addresses = list(netlink.get_addr())
        for link in netlink.get_links():
            flags, name = link["flags"], link.get("ifname")
            if name not in names or not flags & IFF_UP or flags & (IFF_LOOPBACK | IFF_NOARP):
                continue
            hardware = bytes.fromhex((link.get("IFLA_ADDRESS") or "").replace(":", ""))
            if len(hardware) != 6:
                continue
            for message in addresses:
                # The kernel still asks whether somebody else has it, and then announces it.
                is_tentative = message.get("IFA_FLAGS", 0) & IFA_F_TENTATIVE
                if message["index"] != link["index"] or is_tentative:
                    continue
                if message["family"] == socket.AF_INET:
                    _send_arp(name, hardware, message.get("IFA_LOCAL"))
                else:
                    _send_advertisement(link["index"], hardware, message.get("IFA_ADDRESS"))


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
