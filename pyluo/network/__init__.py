"""The network of a host with VMs: recorded before the jump, replayed after it.

The next kernel has the network interfaces of the machine and nothing else. `record` describes what
the host has made of them: bridges and their ports, VLANs, taps, addresses, routes, neighbours.
`replay` makes it again, and tells the neighbours that the host is back. `open_tap` gives a VMM the
descriptor of its tap.

Needs pyroute2: the package pyluo[net]. Everything is about the network namespace of the caller.
"""

from __future__ import annotations

from pyluo.network.announcing import announce
from pyluo.network.recording import record
from pyluo.network.replaying import replay
from pyluo.network.state import Address, Link, Neighbour, NetworkState, Route
from pyluo.network.tap import open_tap

__all__ = [
    "Address",
    "Link",
    "Neighbour",
    "NetworkState",
    "Route",
    "announce",
    "open_tap",
    "record",
    "replay",
]
