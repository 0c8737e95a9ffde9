"""`replay`: make of the network interfaces what was recorded."""

from __future__ import annotations

import time
from contextlib import contextmanager
from errno import EEXIST, ENODEV, ENOTUNIQ
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
)
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import (
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
)
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD, ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import NUD_STALE, ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from pyluo.errors import RequestError
from pyluo.network.announcing import announce_interfaces
from pyluo.network.netlink import (
    connect,
    off_event_loops,
    read_data,
    read_kind,
    read_vlans,
    request,
)
from pyluo.network.recording import FOREVER, MADE, UNSET_IF_ZERO
from pyluo.network.tap import create_tap
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyroute2 import IPRoute

    from pyluo.network.state import Address, Attributes, Link, Neighbour, NetworkState, Route

__all__ = ["replay"]

_REPLAY = Operation("replay the network")

_LEAST_LIFETIME = 60  # seconds
# What of an interface cannot be changed.
_FIXED = {
    "vlan": ("IFLA_VLAN_ID", "IFLA_VLAN_PROTOCOL"),
    "tun": ("IFLA_TUN_TYPE", "IFLA_TUN_MULTI_QUEUE", "IFLA_TUN_OWNER", "IFLA_TUN_GROUP"),
}
_OF_OPENING = ("IFLA_TUN_VNET_HDR", "IFLA_TUN_PI")  # who opens a tap sets these
_CHANGE = NLM_F_REQUEST | NLM_F_ACK
_CREATE = _CHANGE | NLM_F_CREATE | NLM_F_EXCL
_APPEND = _CHANGE | NLM_F_CREATE | NLM_F_APPEND
_REPLACE = _CHANGE | NLM_F_CREATE | NLM_F_REPLACE


@off_event_loops
def replay(state: NetworkState) -> None:
    """Make of the network interfaces what `record` found, and announce their addresses.

    Whatever is there already is adjusted, or told if it cannot be. Nothing is removed but VLANs of
    bridges and their ports that were not recorded: after a failure, the same call completes what is
    missing. What fails does not keep the rest from being made.

    Interfaces of the hardware are found by their own hardware address, also under another name.
    Taps become persistent; `open_tap` opens them.

    Raises:
        ExceptionGroup: of a RequestError for each thing that the kernel refuses, by errno: an
            interface is not there (ENODEV), or another one has its name (EEXIST), or several have
            its hardware address (ENOTUNIQ).

    Source: rtnetlink(7); include/uapi/linux/if_tun.h, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP.
    Linux 3.8.
    """
    with connect(_REPLAY) as netlink:
        replaying = _Replay(netlink, state)
        replaying.run()
        failures = replaying.failures
    try:
        announce_interfaces(replaying.indexes_of_those_up())
    except ExceptionGroup as group:
        failures += group.exceptions
    if failures:
        raise ExceptionGroup("not all of the network could be made again", failures)


class _Replay:
    """A replay under way.

    Attributes:
        failures: what has failed so far.
    """

    def __init__(self, netlink: IPRoute, state: NetworkState) -> None:
        self._netlink = netlink
        self._state = state
        self._indexes: dict[str, int] = {}  # of the interfaces, by the names in the record
        self.failures: list[Exception] = []

    def run(self) -> None:
        """Make everything, in the order in which it builds on each other."""
        state = self._state
        for link in state.links:
            self._attempt(f"interface {link.name}", self._make, link)
        for link in state.links:
            self._attempt_with(link.name, f"interface {link.name}", self._set_up, link)
        passed = max(int(time.time() - state.time), 0)  # the clock may be another one now
        for address in state.addresses:
            subject = f"address {address.attributes.get('IFA_ADDRESS')} of {address.link}"
            self._attempt_with(address.link, subject, self._add_address, address, passed)
        made: set[tuple[Any, ...]] = set()
        for route in state.routes:
            to = f"{route.attributes.get('RTA_DST', 'default')}/{route.fields['dst_len']}"
            subject, place = f"the route to {to}", _place(route)
            # The first takes the place of what is there; others stand beside it.
            flags = _APPEND if place in made else _REPLACE
            made.add(place)
            self._attempt_with(route.link, subject, self._add_route, route, flags)
        for neighbour in state.neighbours:
            name = neighbour.attributes.get("NDA_DST") or neighbour.attributes["NDA_LLADDR"]
            subject = f"neighbour {name} of {neighbour.link}"
            self._attempt_with(neighbour.link, subject, self._add_neighbour, neighbour)

    def indexes_of_those_up(self) -> list[int]:
        """Return the indexes of the interfaces that were up, and are there."""
        names = [link.name for link in self._state.links if link.is_up]
        return [self._indexes[name] for name in names if name in self._indexes]

    def _attempt_with(
        self, link: str, subject: str, make: Callable[..., None], *arguments: Any
    ) -> None:
        """Make something that an interface has; nothing if that is missing, as was told already."""
        if not link or link in self._indexes:
            self._attempt(subject, make, *arguments)

    def _attempt(self, subject: str, make: Callable[..., None], *arguments: Any) -> None:
        try:
            make(*arguments)
        except NetlinkError as error:
            self.failures.append(_REPLAY.error(error.code, subject))
        except RequestError as error:
            self.failures.append(error)

    def _index(self, name: str, wanted_by: str) -> int:
        if name not in self._indexes:
            raise _REPLAY.error(ENODEV, wanted_by, f"{name} is not there")
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
        else:
            self._adjust(link, found)
        if found is None:
            [found] = self._netlink.link_lookup(ifname=link.name)
        self._indexes[link.name] = found

    def _adjust(self, link: Link, index: int) -> None:
        """Give an interface that is there the settings of its kind."""
        [message] = [each for each in self._netlink.get_links() if each["index"] == index]
        present, data = read_data(message), dict(link.data)
        match link.kind:
            case "tun":
                if any(present.get(name) != data.get(name) for name in _OF_OPENING):
                    create_tap(link)
            case "bridge" | "vlan":
                data |= {name: 0 for name in UNSET_IF_ZERO if present.get(name)} | link.data
                self._send(link, _CHANGE, _information("INFO", link.kind, data), index)

    def _find(self, link: Link) -> int | None:
        """Return the index of an interface that is there already; None if there is none."""
        messages = list(self._netlink.get_links())
        if hardware := link.hardware_address:
            same = [each for each in messages if each.get("IFLA_PERM_ADDRESS") == hardware]
            # A virtual function, and what stands in for it, share their address.
            named = [each for each in same if each.get("ifname") == link.name]
            if len(named or same) > 1:
                hint = f"{len(same)} interfaces have the hardware address {hardware}"
                raise _REPLAY.error(ENOTUNIQ, f"interface {link.name}", hint)
            return next((int(each["index"]) for each in named or same), None)
        for message in messages:
            if message.get("ifname") == link.name:
                if misfit := self._misfit(link, message):
                    raise _REPLAY.error(EEXIST, f"interface {link.name}", misfit)
                return int(message["index"])
        return None

    def _misfit(self, link: Link, message: Any) -> str:
        """Return why an interface cannot be made into another of its name; empty if it can."""
        kind, data = read_kind(message), read_data(message)
        if kind != link.kind:
            return f"There is one of kind {kind or 'hardware'}, not {link.kind}"
        for name in _FIXED.get(kind, ()):
            if (data.get(name) or 0) != (link.data.get(name) or 0):
                return f"There is one whose {name} is {data.get(name)}, not {link.data.get(name)}"
        if link.lower and message.get("IFLA_LINK") != self._indexes.get(link.lower):
            return f"There is one on top of another interface than {link.lower}"
        return ""

    def _set_up(self, link: Link) -> None:
        """Make the interface a port, give it its settings, and bring it up."""
        index, subject = self._indexes[link.name], f"interface {link.name}"
        attributes = dict(link.attributes)
        if link.master:
            attributes["IFLA_MASTER"] = self._index(link.master, subject)
        self._send(link, _CHANGE, attributes, index)
        if link.port:
            self._send(link, _CHANGE, _information("INFO_SLAVE", "bridge", link.port), index)
        if link.master or link.kind == "bridge":
            self._set_vlans(link, index)
        if link.is_up:
            self._send(link, _CHANGE, {}, index, flags=IFF_UP, change=IFF_UP)

    def _set_vlans(self, link: Link, index: int) -> None:
        """Let through the VLANs that were recorded, and no other.

        A bridge gives itself and each new port a VLAN, which may have been taken away.
        """
        wanted = dict(link.vlans)
        messages = self._netlink.get_vlans(index=index)
        present = {number for message in messages for number, _ in read_vlans(message)}
        on_itself = {"vlan_flags": "self"} if link.kind == "bridge" else {}
        for number in present - wanted.keys():
            self._netlink.vlan_filter("del", index=index, vlan_info={"vid": number}, **on_itself)
        for number, flags in wanted.items():
            information = {"vid": number, "flags": flags}
            self._netlink.vlan_filter("add", index=index, vlan_info=information, **on_itself)

    def _send(
        self, link: Link, request_flags: int, attributes: Attributes, index: int = 0, **fields: int
    ) -> None:
        message = ifinfmsg()
        message["index"] = index
        for name, value in fields.items():
            message[name] = value
        if not index:
            attributes = {"IFLA_IFNAME": link.name, **attributes}
            if link.lower:
                attributes["IFLA_LINK"] = self._index(link.lower, f"interface {link.name}")
        message["attrs"] = list(attributes.items())
        request(self._netlink, RTM_NEWLINK, request_flags, message)

    def _add_address(self, address: Address, passed: int) -> None:
        message = ifaddrmsg()
        message.update(address.fields)
        message["index"] = self._indexes[address.link]
        attributes = dict(address.attributes)
        # The host had the address a moment ago: nobody else has it.
        attributes["IFA_FLAGS"] |= IFA_F_NODAD
        if lifetimes := attributes.get("IFA_CACHEINFO"):
            attributes["IFA_CACHEINFO"] = {
                name: _seconds_left(seconds, passed) for name, seconds in lifetimes.items()
            }
        message["attrs"] = list(attributes.items())
        request(self._netlink, RTM_NEWADDR, _REPLACE, message)

    def _add_route(self, route: Route, flags: int) -> None:
        message = rtmsg()
        message.update(route.fields)
        attributes = dict(route.attributes)
        if route.link:
            attributes["RTA_OIF"] = self._indexes[route.link]
        if route.hops:
            subject = f"a route to {attributes.get('RTA_DST', 'default')}"
            attributes["RTA_MULTIPATH"] = [
                {
                    **hop["fields"],
                    "oif": self._index(hop["link"], subject),
                    "attrs": list(hop["attributes"].items()),
                }
                for hop in route.hops
            ]
        message["attrs"] = list(attributes.items())
        with _suppress_existing():
            request(self._netlink, RTM_NEWROUTE, flags, message)

    def _add_neighbour(self, neighbour: Neighbour) -> None:
        message = ndmsg()
        message.update(neighbour.fields)
        message["ifindex"] = self._indexes[neighbour.link]
        message["attrs"] = list(neighbour.attributes.items())
        # What the host has learned since then is newer.
        flags = _CREATE if neighbour.fields["state"] == NUD_STALE else _REPLACE
        with _suppress_existing():
            request(self._netlink, RTM_NEWNEIGH, flags, message)


def _place(route: Route) -> tuple[Any, ...]:
    """Return what only one route has, or several that stand beside each other."""
    names = ("RTA_DST", "RTA_TABLE", "RTA_PRIORITY")
    fields = (route.fields[name] for name in ("family", "dst_len", "tos"))
    return (*fields, *(route.attributes.get(name) for name in names))


@contextmanager
def _suppress_existing() -> Iterator[None]:
    """Ignore that what is to be made is there already."""
    try:
        yield
    except NetlinkError as error:
        if error.code != EEXIST:
            raise


def _seconds_left(seconds: int, passed: int) -> int:
    """Return what is left of the lifetime of an address.

    An address whose time is over, perhaps only by the clock of this kernel, gets some more, so that
    whoever has given it can renew it.
    """
    return seconds if seconds in (0, FOREVER) else max(seconds - passed, _LEAST_LIFETIME)


def _information(prefix: str, kind: str, data: Attributes) -> Attributes:
    """Return what a kind of interface, or of ports, is told."""
    members: list[tuple[str, Any]] = [(f"IFLA_{prefix}_KIND", kind)]
    if data:
        members.append((f"IFLA_{prefix}_DATA", {"attrs": list(data.items())}))
    return {"IFLA_LINKINFO": {"attrs": members}}
