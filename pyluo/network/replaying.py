"""`replay`: make of the network interfaces what was recorded."""

from __future__ import annotations

import time
from errno import EEXIST, ENODEV
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import (
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
)
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD, ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from pyluo.errors import RequestError
from pyluo.network.announcing import announce
from pyluo.network.netlink import connect, off_event_loops, request
from pyluo.network.recording import MADE
from pyluo.network.tap import create_tap
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyroute2 import IPRoute

    from pyluo.network.state import Address, Attributes, Link, Neighbour, NetworkState, Route

__all__ = ["replay"]

_REPLAY = Operation("replay the network")

_CHANGE = NLM_F_REQUEST | NLM_F_ACK
_CREATE = _CHANGE | NLM_F_CREATE | NLM_F_EXCL
_REPLACE = _CHANGE | NLM_F_CREATE | NLM_F_REPLACE


@off_event_loops
def replay(state: NetworkState) -> None:
    """Make of the network interfaces what `record` found, and announce their addresses.

    Whatever is there already is adjusted, and nothing is removed but VLANs of a bridge's ports that
    were not recorded: after a failure, the same call completes what is missing. What fails does not
    keep the rest from being replayed.

    Interfaces of the hardware are found by their own hardware address, also under another name.
    Taps become persistent; `open_tap` opens them.

    Raises:
        ExceptionGroup: of a RequestError for each thing that the kernel refuses, by errno: an
            interface is not there (ENODEV), or is of another kind (EEXIST).

    Source: rtnetlink(7)
    """
    with connect(_REPLAY) as netlink:
        _Replay(netlink, state).run()
    announce([link.name for link in state.links if link.is_up])


class _Replay:
    """A replay under way.

    Attributes:
        failures: what has failed so far.
    """

    def __init__(self, netlink: IPRoute, state: NetworkState) -> None:
        self._netlink = netlink
        self._state = state
        self._indexes: dict[str, int] = {}  # of the interfaces, by the names in the record
        self.failures: list[RequestError] = []

    def run(self) -> None:
        state = self._state
        for link in state.links:
            self._attempt(f"interface {link.name}", self._make, link)
        for link in state.links:
            self._attempt(f"interface {link.name}", self._set_up, link)
        passed = int(time.time() - state.time)
        for address in state.addresses:
            name = f"address {address.attributes.get('IFA_ADDRESS')} of {address.link}"
            self._attempt(name, self._add_address, address, passed)
        for route in state.routes:
            to = f"{route.attributes.get('RTA_DST', 'default')}/{route.fields['dst_len']}"
            self._attempt(f"the route to {to}", self._add_route, route)
        for neighbour in state.neighbours:
            name = neighbour.attributes.get("NDA_DST") or neighbour.attributes["NDA_LLADDR"]
            self._attempt(f"neighbour {name} of {neighbour.link}", self._add_neighbour, neighbour)
        if self.failures:
            raise ExceptionGroup("not all of the network could be replayed", self.failures)

    def _attempt(self, subject: str, make: Callable[..., None], *arguments: Any) -> None:
        try:
            make(*arguments)
        except NetlinkError as error:
            self.failures.append(_REPLAY.error(error.code, subject))
        except RequestError as error:
            self.failures.append(error)

    def _index(self, name: str) -> int:
        if name not in self._indexes:
            raise _REPLAY.error(ENODEV, f"interface {name}", "It is not there")
        return self._indexes[name]

    def _make(self, link: Link) -> None:
        """Find the interface, or make it."""
        found = self._find(link)
        if found is None and link.kind not in MADE:
            what = f"It is a {link.kind}, which has to be there" if link.kind else "It is not there"
            raise _REPLAY.error(ENODEV, f"interface {link.name}", what)
        if found is None and link.kind == "tun":
            create_tap(link)
        elif found is None:
            self._send(link, _CREATE, _information("INFO", link.kind, link.data))
        elif link.kind in ("bridge", "vlan"):
            self._send(link, _CHANGE, _information("INFO", link.kind, link.data), found)
        if found is None:
            [found] = self._netlink.link_lookup(ifname=link.name)
        self._indexes[link.name] = found

    def _find(self, link: Link) -> int | None:
        """Return the index of an interface that is there already; None if there is none."""
        by_name: int | None = None
        for message in self._netlink.get_links():
            if link.hardware_address and message.get("IFLA_PERM_ADDRESS") == link.hardware_address:
                return int(message["index"])
            if message.get("ifname") == link.name:
                information = message.get("IFLA_LINKINFO")
                kind = (information and information.get("IFLA_INFO_KIND")) or ""
                if kind != link.kind:
                    hint = f"There is one of kind {kind or 'hardware'}, not {link.kind}"
                    raise _REPLAY.error(EEXIST, f"interface {link.name}", hint)
                by_name = int(message["index"])
        return None if link.hardware_address else by_name

    def _set_up(self, link: Link) -> None:
        """Make the interface a port, give it its settings, and bring it up."""
        index = self._index(link.name)
        attributes = dict(link.attributes)
        if link.master:
            attributes["IFLA_MASTER"] = self._index(link.master)
        self._send(link, _CHANGE, attributes, index)
        if link.port:
            information = _information("INFO_SLAVE", "bridge", link.port)
            self._send(link, _CHANGE, information, index)
        self._set_vlans(link, index)
        if link.is_up:
            self._send(link, _CHANGE, {}, index, flags=IFF_UP, change=IFF_UP)

    def _set_vlans(self, link: Link, index: int) -> None:
        """Let through the VLANs that were recorded, if the bridge tells VLANs apart, and no other.

        A bridge gives each new port a VLAN, which may have been taken away.
        """
        if not link.vlans:
            return
        wanted = dict(link.vlans)
        present: set[int] = set()
        for message in self._netlink.get_vlans(index=index):
            for name, value in (message.get("IFLA_AF_SPEC") or {}).get("attrs", ()):
                if name == "IFLA_BRIDGE_VLAN_INFO":
                    present.add(value["vid"])
        on_itself = {"vlan_flags": "self"} if link.kind == "bridge" else {}
        for number in present - wanted.keys():
            self._netlink.vlan_filter("del", index=index, vlan_info={"vid": number}, **on_itself)
        for number, flags in wanted.items():
            information = {"vid": number, "flags": flags}
            self._netlink.vlan_filter("add", index=index, vlan_info=information, **on_itself)

    def _send(
        self,
        link: Link,
        request_flags: int,
        attributes: Attributes,
        index: int = 0,
        **fields: int,
    ) -> None:
        message = ifinfmsg()
        message["index"] = index
        for name, value in fields.items():
            message[name] = value
        if not index:
            attributes = {"IFLA_IFNAME": link.name, **attributes}
            if link.lower:
                attributes["IFLA_LINK"] = self._index(link.lower)
        message["attrs"] = list(attributes.items())
        request(self._netlink, RTM_NEWLINK, request_flags, message)

    def _add_address(self, address: Address, passed: int) -> None:
        message = ifaddrmsg()
        message.update(address.fields)
        message["index"] = self._index(address.link)
        attributes = dict(address.attributes)
        # The host had the address a moment ago: nobody else has it.
        attributes["IFA_FLAGS"] |= IFA_F_NODAD
        if lifetimes := attributes.get("IFA_CACHEINFO"):
            left = {name: max(seconds - passed, 0) for name, seconds in lifetimes.items()}
            if not left["ifa_valid"]:
                return
            attributes["IFA_CACHEINFO"] = left
        message["attrs"] = list(attributes.items())
        request(self._netlink, RTM_NEWADDR, _REPLACE, message)

    def _add_route(self, route: Route) -> None:
        message = rtmsg()
        message.update(route.fields)
        attributes = dict(route.attributes)
        if route.link:
            attributes["RTA_OIF"] = self._index(route.link)
        if route.hops:
            attributes["RTA_MULTIPATH"] = [
                {
                    **hop["fields"],
                    "oif": self._index(hop["link"]),
                    "attrs": list(hop["attributes"].items()),
                }
                for hop in route.hops
            ]
        message["attrs"] = list(attributes.items())
        request(self._netlink, RTM_NEWROUTE, _REPLACE, message)

    def _add_neighbour(self, neighbour: Neighbour) -> None:
        message = ndmsg()
        message.update(neighbour.fields)
        message["ifindex"] = self._index(neighbour.link)
        message["attrs"] = list(neighbour.attributes.items())
        request(self._netlink, RTM_NEWNEIGH, _REPLACE, message)


def _information(prefix: str, kind: str, data: Attributes) -> Attributes:
    """Return what a kind of interface, or of ports, is told."""
    members = [(f"IFLA_{prefix}_KIND", kind)]
    if data:
        members.append((f"IFLA_{prefix}_DATA", {"attrs": list(data.items())}))  # type: ignore[arg-type]
    return {"IFLA_LINKINFO": {"attrs": members}}
