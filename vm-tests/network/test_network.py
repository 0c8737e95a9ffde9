"""The network of a host comes back after a jump as it was recorded before."""

from __future__ import annotations

import difflib
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from network import guest_network
from pyluo.vm import VM

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN = ("fd00::1", "fd00::5", "fd08::1")  # some addresses of the host


@pytest.fixture(scope="module")
def host() -> Iterator[VM]:
    with VM("previous", to="stable", network=True, call_timeout=300.0) as vm:
        yield vm


def test_all_comes_back_after_a_jump(host: VM) -> None:
    host.call(guest_network.build)
    preserved = host.hold(guest_network.preserve)
    before, left_out = host.call(guest_network.get_described, preserved)
    assert left_out == ("the route to 10.77.0.1/32, which has the type local",)
    host.live_update()
    assert "br0" not in host.call(guest_network.interface_names)
    host.run(["ip", "link", "set", "dummy0", "name", "uplink"])
    for after in host.call(guest_network.replay):
        if found := differences(before, after):
            pytest.fail(found)


def test_addresses_are_announced(host: VM) -> None:
    frames = host.call(guest_network.announced)
    own = bytes.fromhex("020000000001")
    arp = [rest for kind, rest in frames if kind == b"\x08\x06"]
    senders = {rest[14:18] for rest in arp if rest[8:14] == own and rest[14:18] == rest[24:28]}
    assert senders >= {socket.inet_aton(each) for each in ("10.7.0.1", "10.7.0.2")}
    # An advertisement of a neighbour, which overrides what others know.
    told = {
        rest[48:64]
        for kind, rest in frames
        if kind == b"\x86\xdd" and rest[40] == 136 and rest[44] == 0x20 and rest[66:72] == own
    }
    assert told >= {socket.inet_pton(socket.AF_INET6, each) for each in OWN}


def test_a_tap_has_as_many_queues_as_it_was_made_with(host: VM) -> None:
    assert host.call(guest_network.open_taps, "vm0", 3) == ""
    assert "(EBUSY)" in host.call(guest_network.open_taps, "vm1", 2)
    assert "There is no interface of this name" in host.call(guest_network.open_taps, "vm9", 1)
    assert "It is no tap" in host.call(guest_network.open_taps, "br0", 1)


def test_hardware_is_known_by_its_address(host: VM) -> None:
    assert host.call(guest_network.other_name_of_hardware) == "wan 1450"


def test_what_cannot_be_replayed_is_told_and_all_else_is(host: VM) -> None:
    told, names = host.call(guest_network.replay_onto_others)
    for words in (
        "br0: File exists (EEXIST). There is one of kind dummy",
        "service: File exists (EEXIST). There is one whose IFLA_VLAN_ID is 10, not 9",
        "vm1: File exists (EEXIST). There is one whose IFLA_TUN_GROUP is None, not 77",
        "vm0: No such device (ENODEV). br0 is not there",
        "eth9: No such device",
    ):
        assert words in "\n".join(told)
    assert names == ["br0", "lo", "service", "uplink", "vm0", "vm1"]


def test_a_replay_that_was_interrupted_is_completed_by_the_next(host: VM) -> None:
    assert host.call(guest_network.replay_interrupted) > 10


def differences(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> str:
    """Return the lines of two descriptions that differ, for people."""
    old, new = (json.dumps(each, indent=1).splitlines() for each in (before, after))
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=20))
