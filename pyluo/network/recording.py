"""`record`: describe what the host has made of its network interfaces."""

from __future__ import annotations

import ipaddress
import socket
import time
from errno import ENODEV
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import nla_slot
from pyroute2.netlink.rtnl import ifaddrmsg, ndmsg, rt_proto, rt_type
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP
from pyroute2.netlink.rtnl.ifinfmsg.plugins.vlan import flags as vlan_flags
from pyroute2.netlink.rtnl.rtmsg import RTNH_F_ONLINK

from pyluo.network.netlink import connect, off_event_loops, read_data, read_kind, read_vlans
from pyluo.network.state import Address, Link, Neighbour, NetworkState, Route
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pyroute2 import IPRoute

    from pyluo.network.state import Attributes

    Network = ipaddress.IPv4Network | ipaddress.IPv6Network
    Prefix = tuple[int, Network, int]  # the index of an interface, a network and a priority

    # A message of pyroute2: a mapping of its fields, with the attributes in "attrs".
    Message = Any

__all__ = ["FOREVER", "MADE", "UNSET_IF_ZERO", "record"]

_RECORD = Operation("record the network")

MADE = ("bridge", "vlan", "tun", "dummy")
"""The kinds of interfaces that `replay` makes."""

_LINK = ("IFLA_MTU", "IFLA_TXQLEN", "IFLA_GROUP", "IFLA_IFALIAS")
# What can be set. The rest of these attributes is what the kernel counts, or finds out by itself.
_DATA = {
    "bridge": [
        "IFLA_BR_" + name
        for name in (
            "FORWARD_DELAY", "HELLO_TIME", "MAX_AGE", "AGEING_TIME", "STP_STATE", "PRIORITY",
            "VLAN_PROTOCOL", "VLAN_FILTERING", "VLAN_DEFAULT_PVID", "VLAN_STATS_ENABLED",
            "GROUP_FWD_MASK", "MCAST_ROUTER", "MCAST_SNOOPING", "MCAST_QUERY_USE_IFADDR",
            "MCAST_QUERIER", "MCAST_STATS_ENABLED", "MCAST_HASH_MAX", "MCAST_LAST_MEMBER_CNT",
            "MCAST_STARTUP_QUERY_CNT", "MCAST_LAST_MEMBER_INTVL", "MCAST_MEMBERSHIP_INTVL",
            "MCAST_QUERIER_INTVL", "MCAST_QUERY_INTVL", "MCAST_QUERY_RESPONSE_INTVL",
            "MCAST_STARTUP_QUERY_INTVL", "MCAST_IGMP_VERSION", "MCAST_MLD_VERSION",
            "NF_CALL_IPTABLES", "NF_CALL_IP6TABLES", "NF_CALL_ARPTABLES",
        )
    ],
    "vlan": [
        "IFLA_VLAN_" + name
        for name in ("ID", "PROTOCOL", "FLAGS", "EGRESS_QOS", "INGRESS_QOS")
    ],
    "tun": [
        "IFLA_TUN_" + name
        for name in ("TYPE", "PI", "VNET_HDR", "MULTI_QUEUE", "PERSIST", "OWNER", "GROUP")
    ],
    "dummy": [],
}  # fmt: skip
_PORT = [
    "IFLA_BRPORT_" + name
    for name in (
        "PRIORITY", "COST", "MODE", "GUARD", "PROTECT", "FAST_LEAVE", "LEARNING", "UNICAST_FLOOD",
        "MCAST_FLOOD", "BCAST_FLOOD", "MCAST_TO_UCAST", "PROXYARP", "PROXYARP_WIFI",
        "MULTICAST_ROUTER", "GROUP_FWD_MASK", "NEIGH_SUPPRESS", "ISOLATED", "LOCKED", "MAB",
        "VLAN_TUNNEL", "NEIGH_VLAN_SUPPRESS",
    )
]  # fmt: skip
_VLAN_FLAGS = sum(vlan_flags.values())
UNSET_IF_ZERO = ("IFLA_BR_VLAN_FILTERING", "IFLA_BR_VLAN_STATS_ENABLED")
"""What a kernel without the option refuses to be told, even if it is the default."""

_ADDRESS = ("IFA_ADDRESS", "IFA_LOCAL", "IFA_BROADCAST", "IFA_LABEL", "IFA_RT_PRIORITY")
_ADDRESS_FLAGS = (
    ifaddrmsg.IFA_F_NODAD
    | ifaddrmsg.IFA_F_HOMEADDRESS
    | ifaddrmsg.IFA_F_MANAGETEMPADDR
    | ifaddrmsg.IFA_F_NOPREFIXROUTE
    | ifaddrmsg.IFA_F_MCAUTOJOIN
)
FOREVER = 0xFFFFFFFF
"""The lifetime of an address without an end, in seconds."""

_KERNELS_ADDRESSES = (1, 2, 3)  # IFAPROT_KERNEL_LO, IFAPROT_KERNEL_RA, IFAPROT_KERNEL_LL

_ROUTE_FIELDS = ("family", "dst_len", "src_len", "tos", "table", "proto", "scope", "type")
_ROUTE = (
    "RTA_DST", "RTA_SRC", "RTA_GATEWAY", "RTA_VIA", "RTA_PREFSRC", "RTA_PRIORITY", "RTA_TABLE",
    "RTA_METRICS", "RTA_PREF",
)  # fmt: skip
_HOP = ("RTA_GATEWAY", "RTA_VIA")
_NOT_REPLAYED = ("RTA_ENCAP", "RTA_NH_ID", "RTA_FLOW")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RTM_F_CLONED = 0x200
_RT_TABLE_MAIN = 254
_PRIORITIES = {socket.AF_INET: 0, socket.AF_INET6: 256}  # of the kernel's own routes
_PRIORITY_OF_NONE = 0xFFFFFFFF  # of the route that IPv6 has if it has no default route
_RT_TABLE_LOCAL = 255
_TYPES = [rt_type[name] for name in ("unicast", "blackhole", "unreachable", "prohibit", "throw")]
_OTHERS_ROUTES = [rt_proto[name] for name in ("redirect", "ra")]

_NUD_KNOWN = ndmsg.NUD_REACHABLE | ndmsg.NUD_STALE | ndmsg.NUD_DELAY | ndmsg.NUD_PROBE
_NUD_STATIC = ndmsg.NUD_NOARP  # of an entry of a bridge that was not learned


@off_event_loops
def record(names: Sequence[str] | None = None) -> NetworkState:
    """Describe the network interfaces, their addresses, routes and neighbours, for `replay`.

    What the kernel or a router has made by itself is not recorded: it comes back by itself.

    Args:
        names: the names of the interfaces; None for all. Those that they are ports of, or on top
            of, are recorded as well.

    Raises:
        RequestError: there is no interface of such a name (ENODEV).

    Source: rtnetlink(7)
    """
    with connect(_RECORD) as netlink:
        messages = {message["index"]: message for message in netlink.get_links()}
        known = {message.get("ifname"): index for index, message in messages.items()}
        for name in names or ():
            if name not in known:
                raise _RECORD.error(ENODEV, name, "There is no interface of this name")
        wanted = _with_what_they_need(
            messages, messages.keys() if names is None else {known[name] for name in names}
        )
        links = {index: messages[index].get("ifname") for index in wanted}
        left_out = list(_describe_what_is_left_out(messages, links))
        addresses = [each for each in netlink.get_addr() if each["family"] in _FAMILIES]
        routes = sorted(
            _routes(netlink, links, _prefixes(addresses), left_out),
            key=lambda route: bool(route.hops) or any(name in route.attributes for name in _HOP),
        )
        return NetworkState(
            links=tuple(_links(netlink, [messages[index] for index in wanted], links)),
            addresses=tuple(_in_order_of_making(_addresses(addresses, links))),
            routes=tuple(routes),
            neighbours=tuple(_neighbours(netlink, links)),
            time=time.time(),
            left_out=tuple(left_out),
        )


def _with_what_they_need(messages: dict[int, Message], chosen: Any) -> list[int]:
    """Return the indexes of interfaces, each one after those that it is on top of, or a port of."""
    ordered: list[int] = []

    def add(index: int) -> None:
        if index in ordered or index not in messages:
            return
        message = messages[index]
        for other in (_lower(message), message.get("IFLA_MASTER")):
            if other:
                add(other)
        if index not in ordered:
            ordered.append(index)

    for index in chosen:
        add(index)
    return ordered


def _lower(message: Message) -> int:
    """Return the index of the interface that a VLAN is on; 0 if it is not on one of these."""
    if message.get("IFLA_LINK_NETNSID") is not None or read_kind(message) != "vlan":
        return 0
    return int(message.get("IFLA_LINK") or 0)


def _describe_what_is_left_out(
    messages: dict[int, Message], links: dict[int, str]
) -> Iterator[str]:
    """Yield words for what the interfaces have, and `replay` does not give them."""
    for index, name in links.items():
        message = messages[index]
        master = messages.get(message.get("IFLA_MASTER"))
        if master is not None and read_kind(master) != "bridge":
            kind = read_kind(master) or "interface"
            yield f"{name} is a part of the {kind} {master.get('ifname')}"
        hardware = message.get("IFLA_PERM_ADDRESS")
        if hardware and message.get("IFLA_ADDRESS") != hardware:
            yield f"{name} has another hardware address than its own: {message.get('IFLA_ADDRESS')}"


def _links(netlink: IPRoute, messages: Sequence[Message], names: dict[int, str]) -> Iterator[Link]:
    vlans = {message["index"]: message for message in netlink.get_vlans()}
    for message in messages:
        kind, index = read_kind(message), message["index"]
        is_port = read_data(message, "IFLA_INFO_SLAVE_KIND") == "bridge"
        hardware = message.get("IFLA_PERM_ADDRESS") or ""
        attributes = _choose(message, _LINK)
        if kind in MADE and message.get("IFLA_ADDRESS") not in (None, hardware):
            attributes["IFLA_ADDRESS"] = message.get("IFLA_ADDRESS")
        yield Link(
            name=names[index],
            kind=kind,
            hardware_address=hardware,
            is_up=bool(message["flags"] & IFF_UP),
            master=names.get(message.get("IFLA_MASTER"), "") if is_port else "",
            lower=names.get(_lower(message), ""),
            attributes=attributes,
            data=_choose(read_data(message), _DATA[kind]) if kind in MADE else {},
            port=_choose(read_data(message, "IFLA_INFO_SLAVE_DATA"), _PORT) if is_port else {},
            vlans=list(read_vlans(vlans.get(index))),
        )


def _addresses(messages: Sequence[Message], links: dict[int, str]) -> Iterator[Address]:
    for message in messages:
        if message["index"] not in links or message.get("IFA_PROTO") in _KERNELS_ADDRESSES:
            continue
        attributes = _choose(message, _ADDRESS)
        attributes["IFA_FLAGS"] = message.get("IFA_FLAGS", 0) & _ADDRESS_FLAGS
        lifetimes = message.get("IFA_CACHEINFO") or {}
        left = {name: lifetimes.get(name, FOREVER) for name in ("ifa_preferred", "ifa_valid")}
        if min(left.values()) != FOREVER:
            attributes["IFA_CACHEINFO"] = left
        fields = {name: message[name] for name in ("family", "prefixlen", "scope")}
        yield Address(link=links[message["index"]], fields=fields, attributes=attributes)


def _in_order_of_making(addresses: Iterable[Address]) -> list[Address]:
    """Sort addresses: the kernel lists those of IPv4 in the order in which they were added, and
    those of IPv6 the other way round.
    """
    both = list(addresses)
    newest_first = [each for each in both if each.fields["family"] == socket.AF_INET6]
    others = [each for each in both if each.fields["family"] != socket.AF_INET6]
    return others + newest_first[::-1]


def _prefixes(addresses: Sequence[Message]) -> set[Prefix]:
    """Return the networks to which the kernel has made a route for an address by itself."""
    return {
        (
            message["index"],
            _network(message.get("IFA_ADDRESS") or message.get("IFA_LOCAL"), message["prefixlen"]),
            message.get("IFA_RT_PRIORITY") or _PRIORITIES[message["family"]],
        )
        for message in addresses
        if not message.get("IFA_FLAGS", 0) & ifaddrmsg.IFA_F_NOPREFIXROUTE
    }


def _network(address: str, length: int) -> Network:
    return ipaddress.ip_network(f"{address}/{length}", strict=False)


def _is_the_kernels(route: Message, prefixes: set[Prefix]) -> bool:
    """Return whether the kernel, or a router, makes a route again by itself.

    Other programs call their routes the kernel's, too: NetworkManager, for an address for which it
    asked the kernel to make none, and whoever copies a route into another table.
    """
    if route["flags"] & _RTM_F_CLONED or route["proto"] in _OTHERS_ROUTES:
        return True
    if route["proto"] != rt_proto["kernel"]:
        return False
    if route["type"] not in _TYPES or _has_an_end(route):
        return True
    if route.get("RTA_DST") is None:
        return bool(route.get("RTA_PRIORITY") == _PRIORITY_OF_NONE)
    network = _network(route.get("RTA_DST"), route["dst_len"])
    is_of_ipv6_itself = network.version == 6 and (network.is_link_local or network.is_multicast)
    priority = route.get("RTA_PRIORITY") or _PRIORITIES.get(route["family"])
    is_main = route.get("RTA_TABLE", route["table"]) == _RT_TABLE_MAIN
    return is_of_ipv6_itself or (is_main and (route.get("RTA_OIF"), network, priority) in prefixes)


def _has_an_end(route: Message) -> bool:
    return bool((route.get("RTA_CACHEINFO") or {}).get("rta_expires"))


def _routes(
    netlink: IPRoute,
    links: dict[int, str],
    prefixes: set[Prefix],
    left_out: list[str],
) -> Iterator[Route]:
    for message in netlink.get_routes():
        hops = message.get("RTA_MULTIPATH") or []
        outputs = {message.get("RTA_OIF"), *(hop["oif"] for hop in hops)} - {None}
        if _is_the_kernels(message, prefixes) or not outputs <= links.keys():
            continue
        if reason := _reason_to_leave_out(message):
            where = f"{message.get('RTA_DST') or 'default'}/{message['dst_len']}"
            left_out.append(f"the route to {where}, which has {reason}")
            continue
        yield Route(
            link=links.get(message.get("RTA_OIF"), ""),
            fields={name: message[name] for name in _ROUTE_FIELDS}
            | {"flags": message["flags"] & RTNH_F_ONLINK},
            attributes=_choose(message, _ROUTE),
            hops=[
                {
                    "link": links[hop["oif"]],
                    "fields": {"hops": hop["hops"], "flags": hop["flags"] & RTNH_F_ONLINK},
                    "attributes": _choose(hop, _HOP),
                }
                for hop in hops
            ],
        )


def _reason_to_leave_out(route: Message) -> str:
    """Return what a route has that `replay` cannot give it; empty if nothing."""
    if route.get("RTA_TABLE", route["table"]) == _RT_TABLE_LOCAL or route["type"] not in _TYPES:
        return f"the type {rt_type.get(route['type'], route['type'])}"
    if _has_an_end(route):
        return "an end"
    parts = [route, *(route.get("RTA_MULTIPATH") or ())]
    found = (name for name in _NOT_REPLAYED for part in parts if part.get(name) is not None)
    return next(found, "")


def _neighbours(netlink: IPRoute, links: dict[int, str]) -> Iterator[Neighbour]:
    entries = [*netlink.get_neighbours(), *netlink.fdb("dump")]
    for message in entries:
        state, is_bridges = message["state"], message["family"] == socket.AF_BRIDGE
        if message["ifindex"] not in links or message.get("NDA_LLADDR") is None:
            continue
        if is_bridges and not state & _NUD_STATIC:
            continue  # learned, or the bridge's own
        if not is_bridges and not state & (ndmsg.NUD_PERMANENT | _NUD_KNOWN):
            continue
        fields = {
            "family": message["family"],
            "state": ndmsg.NUD_STALE if state & _NUD_KNOWN and not is_bridges else state,
            "flags": message["flags"],
        }
        attributes = _choose(message, ("NDA_DST", "NDA_LLADDR", "NDA_VLAN"))
        yield Neighbour(link=links[message["ifindex"]], fields=fields, attributes=attributes)


def _choose(message: Message | None, names: Sequence[str]) -> Attributes:
    """Return the attributes of these names that a message has, as JSON represents them."""
    found: Attributes = {}
    for name in names:
        value = None if message is None else message.get(name)
        if value is None or (value == 0 and name in UNSET_IF_ZERO):
            continue
        found[name] = _plain(value)
        if name == "IFLA_VLAN_FLAGS":  # the kernel says, and does not accept, that it is for all
            found[name]["mask"] = _VLAN_FLAGS
    return found


def _plain(value: Any) -> Any:
    """Return a value of pyroute2 without what only its own decoder needs."""
    if isinstance(value, dict):
        return {
            name: _plain(each) for name, each in value.items() if name not in ("header", "value")
        }
    if isinstance(value, list | tuple | nla_slot):
        return [_plain(each) for each in value]
    return value
