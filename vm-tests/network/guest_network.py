"""What the tests of the network do in the guest."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyluo import IncomingStore, KeeperChoice, Memfd, OutgoingStore, network
from pyluo.errors import RequestError
from pyluo.network import Link

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from pyluo import OwnedFd

CLONE_NEWNET = 0x40000000
STEP = 97  # lines from one interruption to the next
ROOM = 64 << 10  # bytes of the file with the record
COMMANDS = """
link set dev dummy0 name uplink
link set dev uplink mtu 1400 up
link add name br0 type bridge vlan_filtering 1 vlan_default_pvid 7 ageing_time 12300 priority 4096
link set dev br0 address 02:00:00:00:00:01 up
link add link uplink name uplink.100 type vlan id 100 egress-qos-map 1:3
link set dev uplink.100 master br0 up
link add link uplink name service type vlan id 9 protocol 802.1ad
link set dev service up
tuntap add dev vm0 mode tap vnet_hdr multi_queue user 1234
link set dev vm0 address 02:00:00:00:01:00 alias VM.zero master br0 up
link set dev vm0 type bridge_slave isolated on learning off cost 17 guard on
tuntap add dev vm1 mode tap group 77
link set dev vm1 mtu 1300 txqueuelen 333 master br0
tuntap add dev point mode tun pi
link set dev point up
link add name br1 type bridge stp_state 1 forward_delay 400
address add 10.7.0.1/24 dev br0
address add 10.7.0.2/24 dev br0 label br0:two
address add 10.8.0.1/24 dev service noprefixroute
address add 10.9.0.1 peer 10.9.0.2/32 dev point
address add fd00::1/64 dev br0 nodad
address add fd00::5/64 dev br0 nodad valid_lft 5000 preferred_lft 4000
address add fd00::7/64 dev br0 nodad preferred_lft 0
address add fe80::1/64 dev br0 nodad
address add fd08::1 peer fd08::2/128 dev br0 nodad
route add 10.20.0.0/16 via 10.7.0.254 metric 55 mtu 1200
route add 10.21.0.0/16 via 10.7.0.254 tos 0x10 src 10.7.0.2
route add default via 10.7.0.253 metric 900
-6 route add fd03::/64 nexthop via fd00::98 weight 3 nexthop via fd00::97
route add 10.23.0.0/16 via 10.99.0.1 dev br0 onlink
route add blackhole 10.24.0.0/16
route add 10.8.0.0/24 dev service scope link proto kernel
route append 10.26.0.0/16 via 10.7.0.250 metric 5
route append 10.26.0.0/16 via 10.7.0.249 metric 5
route add local 10.77.0.1 dev lo
route add 10.25.0.0/16 dev point scope link proto 42
-6 route add fd01::/64 via fd00::99 metric 77
-6 route add unreachable fd02::/64
neighbour add 10.7.0.254 lladdr 02:00:00:00:00:fe dev br0 nud permanent
neighbour add 10.7.0.253 lladdr 02:00:00:00:00:fd dev br0 nud reachable
neighbour add fd00::99 lladdr 02:00:00:00:00:99 dev br0 nud permanent
"""
BRIDGE = """
vlan del dev vm0 vid 7
vlan add dev vm0 vid 30 pvid untagged
vlan add dev vm0 vid 31
vlan add dev br0 vid 31 self
vlan del dev br0 vid 7 self
vlan del dev br1 vid 1 self
fdb add 02:00:00:00:00:77 dev vm0 master static vlan 31
"""
# What counts, or is found out by the kernel.
_CHANGING = {
    "tentative",
    "ifindex", "link_index", "stats64", "gc_timer", "hello_timer", "tcn_timer", "bridge_id",
    "root_id", "topology_change_timer", "message_age_timer", "forward_delay_timer", "hold_timer",
    "designated_port", "designated_bridge", "operstate", "valid_life_time",
    "preferred_life_time", "root_port", "port_id", "carrier_changes", "promiscuity", "allmulti",
    "updated", "used", "parentdev", "parentbus", "designated_root", "root_path_cost",
}  # fmt: skip
_OF_PORTS = {"id", "no"}


def build() -> None:
    """Make what a host of VMs has, and a bit of everything else."""
    for program, commands in (("ip", COMMANDS), ("bridge", BRIDGE)):
        for line in commands.strip().splitlines():
            run(program, *line.split())


def run(program: str, *words: str) -> str:
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def describe() -> dict[str, list[Any]]:
    """Return what iproute2 says of the network, without what changes by itself.

    It knows more than pyluo records, and reads it by code of its own.
    """
    asked = {
        "links": ["ip", "-d", "-j", "link", "show"],
        "addresses": ["ip", "-d", "-j", "address", "show"],
        "routes": ["ip", "-d", "-j", "route", "show", "table", "all"],
        "routes of IPv6": ["ip", "-d", "-j", "-6", "route", "show", "table", "all"],
        "VLANs": ["bridge", "-j", "vlan", "show"],
        "neighbours": ["ip", "-d", "-j", "neighbour", "show"],
    }
    described = {
        name: sorted(map(_plain, filter(_is_made, json.loads(run(*words)))), key=json.dumps)
        for name, words in asked.items()
    }
    static = [each for each in json.loads(run("bridge", "-j", "fdb", "show")) if _is_static(each)]
    return described | {"entries of bridges": static}


def _is_made(entry: dict[str, Any]) -> bool:
    """Return whether neither the kernel nor a router makes something by itself, nor pyluo leaves it
    out.
    """
    if entry.get("type") == "local":
        return False
    # The kernel has made no such route, whatever it is called.
    return entry.get("protocol") not in ("kernel", "ra") or entry.get("dst") == "10.8.0.0/24"


def _is_static(entry: dict[str, Any]) -> bool:
    return entry.get("state") == "static"


def _plain(value: Any, changing: AbstractSet[str] = _CHANGING) -> Any:
    if isinstance(value, dict):
        kept = {
            name: _plain(each, _CHANGING | _OF_PORTS if name == "info_slave_data" else changing)
            for name, each in value.items()
            if name not in changing
        }
        # A reachable neighbour must be asked once more.
        return kept | ({"state": ["STALE"]} if kept.get("state") == ["REACHABLE"] else {})
    if isinstance(value, list):
        return [_plain(each, changing) for each in value]
    return value


async def _record() -> network.NetworkState:
    """Record the network where an event loop runs."""
    return network.record()


def preserve() -> tuple[OutgoingStore, dict[str, list[Any]], tuple[str, ...]]:
    """Put a record into a store; return what iproute2 says as well."""
    state = asyncio.run(_record())
    file = Memfd.create("network", ROOM)
    state.write(file)
    store = OutgoingStore.create("network", keeper=KeeperChoice.NONE)
    store.add("state", file)
    return store, describe(), state.left_out


def get_described(preserved: tuple[OutgoingStore, Any, Any]) -> tuple[Any, Any]:
    return preserved[1], preserved[2]


def replay() -> list[dict[str, list[Any]]]:
    """Replay what the store has, twice; return what iproute2 says then, each time."""
    store = IncomingStore.retrieve("network", keeper=KeeperChoice.NONE)
    with store.get("state", Memfd) as file:
        state = network.NetworkState.read(file)
        store.finish()
    described = []
    for _ in range(2):
        network.replay(state)
        described.append(describe())
    return described


def replay_interrupted() -> int:
    """Interrupt a replay at many lines, in a new namespace each time, and complete it by another.

    Returns:
        How many were interrupted.
    """
    names = ["vm0", "vm1", "service"]
    state = network.record(names)
    for interrupted, number in enumerate(range(0, 9000, STEP)):
        with _new_namespace():
            run("ip", "link", "add", "name", "uplink", "type", "dummy")
            if not _replay_until(state, number):
                return interrupted
            network.replay(state)
            found = network.record(names)
            assert found.links == state.links, number
            assert found.routes == state.routes, number
            assert [each.link for each in found.addresses] == [
                each.link for each in state.addresses
            ], number
    raise AssertionError("the replay never came to its end")


@contextmanager
def _new_namespace() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as present:
        if libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            yield
        finally:
            if libc.setns(present.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def _replay_until(state: network.NetworkState, number: int) -> bool:
    """Replay a state, and interrupt that at a line; return whether there was such a line."""
    passed = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal passed
        if f"{os.sep}pyluo{os.sep}network{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line":
            passed += 1
            if passed > number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        network.replay(state)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def announced() -> list[tuple[bytes, bytes]]:
    """Announce the addresses of the bridge; return the frames that come out at a tap.

    Returns:
        The type of each frame, as Ethernet has it, and the rest of it.
    """
    run("bridge", "vlan", "add", "dev", "br0", "vid", "30", "self", "pvid", "untagged")
    with network.open_tap("vm0") as tap:
        _read_frames(tap)  # what comes by itself
        network.announce(["br0"])
        return [(frame[12:14], frame[14:]) for frame in _read_frames(tap)]


def _read_frames(tap: OwnedFd) -> list[bytes]:
    """Return the frames that come within a while, without the header of virtio-net."""
    frames = []
    until = time.monotonic() + 1.0
    while select.select([tap], [], [], max(0.0, until - time.monotonic()))[0]:
        frames.append(os.read(tap.fileno(), 4096)[10:])
    return frames


def open_taps(name: str, count: int) -> str:
    """Open queues of a tap; return why the last one cannot be opened, or nothing."""
    opened = []
    try:
        for _ in range(count):
            opened.append(network.open_tap(name))
    except RequestError as error:
        return str(error)
    finally:
        for tap in opened:
            tap.close()
    return ""


def replay_onto_others() -> tuple[list[str], list[str]]:
    """Replay where an interface is another one, and another is not there.

    Returns:
        What is told, and the names of the interfaces that are there then.
    """
    hardware = Link(
        name="eth9", kind="", hardware_address="02:00:00:00:00:09", is_up=True, master="", lower="",
        attributes={},
    )  # fmt: skip
    state = network.record(["vm0", "vm1", "service"])
    state = replace(state, links=(*state.links, hardware))
    with _new_namespace():
        run("ip", "link", "add", "name", "br0", "type", "dummy")
        run("ip", "link", "add", "name", "uplink", "type", "dummy")
        run("ip", "link", "add", "link", "uplink", "name", "service", "type", "vlan", "id", "10")
        run("ip", "tuntap", "add", "dev", "vm1", "mode", "tap")
        try:
            network.replay(state)
        except ExceptionGroup as group:
            return [str(error) for error in group.exceptions], interface_names()
    return [], []


def interface_names() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def other_name_of_hardware() -> str:
    """Give the hardware another name, replay, and return what has got its settings."""
    run("ip", "link", "set", "dev", "eth0", "mtu", "1450")
    state = network.record(["eth0"])
    for words in ("down", "name wan mtu 1500", "up"):
        run("ip", "link", "set", "dev", *("wan" if words == "up" else "eth0", *words.split()))
    network.replay(state)
    [link] = [each for each in network.record(["wan"]).links if each.name == "wan"]
    return f"{link.name} {link.attributes['IFLA_MTU']}"
