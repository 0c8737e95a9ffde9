"""`NetworkState`: what a host has made of its network interfaces."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pyluo.state_format import StateFormat

if TYPE_CHECKING:
    from pyluo.memfd import Memfd

__all__ = ["Address", "Link", "Neighbour", "NetworkState", "Route"]

_FORMAT = StateFormat("pyluoNet", 1)

# Attributes of a netlink message, by the kernel's names; a nested one as pyroute2 decodes it.
Attributes = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network interface.

    Attributes:
        name: its name.
        kind: "bridge", "vlan", "tun" (a tap, too) or "dummy" for those that `replay` makes; another
            kind, or "" for hardware, for those that must be there already.
        hardware_address: the address that the hardware itself has; "" if it has none.
        is_up: whether it is up.
        master: the name of the bridge of which it is a port; "" if none.
        lower: the name of the interface that a VLAN is on; "" if none.
        attributes: its IFLA_MTU, IFLA_ADDRESS and so on.
        data: the IFLA_INFO_DATA of its kind.
        port: the IFLA_INFO_SLAVE_DATA of a port of a bridge.
        vlans: the VLANs that a bridge or a port of one lets through: their numbers and flags
            (BRIDGE_VLAN_INFO_*).

    Source: include/uapi/linux/if_link.h, IFLA_*
    """

    name: str
    kind: str
    hardware_address: str
    is_up: bool
    master: str
    lower: str
    attributes: Attributes
    data: Attributes = field(default_factory=dict)
    port: Attributes = field(default_factory=dict)
    vlans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address of an interface.

    Attributes:
        link: the name of the interface.
        fields: `family`, `prefixlen` and `scope`.
        attributes: its IFA_ADDRESS and so on.

    Source: include/uapi/linux/if_addr.h, struct ifaddrmsg, IFA_*
    """

    link: str
    fields: dict[str, int]
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route that neither the kernel nor a router has made by itself.

    Attributes:
        link: the name of the interface it leads to; "" if it leads to none, or to several.
        fields: `family`, `dst_len`, `table`, `type` and so on.
        attributes: its RTA_DST and so on.
        hops: the next hops of a route over several: each one's `link`, `fields` and `attributes`.

    Source: include/uapi/linux/rtnetlink.h, struct rtmsg, RTA_*
    """

    link: str
    fields: dict[str, int]
    attributes: Attributes
    hops: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """The hardware address of a neighbour, or a static entry of a bridge.

    Attributes:
        link: the name of the interface.
        fields: `family`, `state` and `flags`.
        attributes: its NDA_DST, NDA_LLADDR, NDA_VLAN.

    Source: include/uapi/linux/neighbour.h, struct ndmsg, NDA_*
    """

    link: str
    fields: dict[str, int]
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkState:
    """What a host has made of its network interfaces; `record` makes it, and `replay` takes it.

    Attributes:
        links: the interfaces, in an order in which they can be made.
        addresses: their addresses.
        routes: the routes, in an order in which they can be made.
        neighbours: the neighbours.
        time: when it was recorded, in seconds of CLOCK_REALTIME since 1970; what is left of the
            lifetime of an address counts from then.
        left_out: what is there and is not recorded, in words.
    """

    links: tuple[Link, ...]
    addresses: tuple[Address, ...]
    routes: tuple[Route, ...]
    neighbours: tuple[Neighbour, ...]
    time: float
    left_out: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """Return the state as bytes, with a checksum, for `unpack`."""
        return _FORMAT.pack(self._encode())

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the state that `pack` was called on.

        Raises:
            RequestError: the bytes are no state, or not all of one (EBADMSG), or of another version
                (EPROTONOSUPPORT).
        """
        members = json.loads(_FORMAT.unpack(data))
        for link in members["links"]:
            link["vlans"] = [(number, flags) for number, flags in link["vlans"]]
        kinds = {"links": Link, "addresses": Address, "routes": Route, "neighbours": Neighbour}
        for name, kind in kinds.items():
            members[name] = tuple(kind(**each) for each in members[name])
        members["left_out"] = tuple(members["left_out"])
        return cls(**members)

    def write(self, file: Memfd) -> None:
        """Write the state into a file, whose size does not change.

        Raises:
            ValueError: the file is too small; it is as it was.
        """
        _FORMAT.write(file, self._encode())

    @classmethod
    def read(cls, file: Memfd) -> Self:
        """Return the state in a file.

        Raises:
            RequestError: as `unpack`.
        """
        return cls.unpack(file.read(file.size, 0))

    def _encode(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()
