"""The bridge of the VMs, in the guest that is their host."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from pyluo import IncomingStore, Memfd, OutgoingStore, network

if TYPE_CHECKING:
    from collections.abc import Sequence

BRIDGE = "br0"
_NAME = "network"  # of the store
_ROOM = 64 << 10  # bytes


def build(taps: Sequence[str]) -> None:
    """Make a bridge of the host's interface and of taps."""
    for line in [
        f"link add name {BRIDGE} type bridge",
        f"link set dev {BRIDGE} up",
        f"link set dev eth0 master {BRIDGE}",
        *(f"tuntap add dev {tap} mode tap vnet_hdr" for tap in taps),
        *(f"link set dev {tap} master {BRIDGE} up" for tap in taps),
    ]:
        subprocess.run(["ip", *line.split()], check=True)


def preserve() -> None:
    """Record the network, and keep the record for the next kernel."""
    store = OutgoingStore.create(_NAME)
    file = Memfd.create(_NAME, _ROOM)
    network.record().write(file)
    store.add("state", file)
    store.close()


def replay() -> None:
    """Make the network again."""
    store = IncomingStore.retrieve(_NAME)
    with store.get("state", Memfd) as file:
        network.replay(network.NetworkState.read(file))
        store.finish()
