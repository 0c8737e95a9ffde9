"""Tests of `pyluo probe`, and of listing the open sessions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sessions import guest_files, guest_requests

from pyluo import IncomingSession, LiveUpdate, OutgoingSession
from pyluo.open_sessions import open_sessions
from pyluo.probe import Verdict, probe
from tests.json_output import read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm import VM

PYLUO = os.fspath(Path(sys.executable).parent / "pyluo")
EVERYTHING: dict[str, Any] = {
    "devices": ["intel-iommu,intremap=on,aw-bits=39", "edu"],
    "append": "intel_iommu=on vfio-pci.ids=1234:11e8",
}
# If a test fails because a kernel preserves more, add a line to the manual's table as well.
PRESERVED = {"memfd", "memfd, sealed", "memfd, noexec", "unnamed file of a tmpfs"}
REFUSED = {
    "memfd, 2 MiB huge pages",
    "memfd, 1 GiB huge pages",
    "eventfd",
    "iommufd",
    "VFIO device",
    "KVM VM",
    "guest_memfd",
}


@pytest.mark.parametrize("name", ["stable", "previous"])
def test_a_kernel_is_asked_for_every_kind_of_file(guest: Callable[..., VM], name: str) -> None:
    vm = guest(name, **EVERYTHING)
    findings = vm.call(probe)
    text = vm.run([PYLUO, "probe"])
    data = vm.run([PYLUO, "probe", "--json"])
    assert vm.call(can_create_session)
    by_verdict = {verdict: set[str]() for verdict in Verdict}
    for finding in findings:
        by_verdict[finding.verdict].add(finding.kind)
    assert by_verdict[Verdict.PRESERVED] == PRESERVED
    assert by_verdict[Verdict.REFUSED] == REFUSED
    assert by_verdict[Verdict.ABSENT] == set()
    assert text.returncode == 0
    assert b"eventfd                  refused    ENOENT" in text.stdout
    kinds = {kind["kind"]: kind["verdict"] for kind in read_json("probe", data.stdout)["kinds"]}
    assert kinds == {finding.kind: finding.verdict.value for finding in findings}


def test_what_a_system_lacks_is_absent_and_not_refused(shared_vm: VM) -> None:
    findings = {finding.kind: finding for finding in shared_vm.call(probe)}
    assert findings["VFIO device"].verdict is Verdict.ABSENT
    assert findings["VFIO device"].reason == "no device is bound to a VFIO driver"
    assert findings["memfd"].verdict is Verdict.PRESERVED


def test_sessions_are_found_by_who_holds_them_and_which_way_they_go(
    cold_vm: VM,
) -> None:
    cold_vm.hold(guest_files.preserve, "vm0", 4096)
    cold_vm.live_update()
    both, worker = cold_vm.hold(open_both_directions), cold_vm.call(os.getpid)
    found = {holder.session: holder for holder in cold_vm.call(open_sessions)}
    text = cold_vm.run([PYLUO, "status"]).stdout.decode()
    data = read_json("status", cold_vm.run([PYLUO, "status", "--json"]).stdout)
    cold_vm.call(close_both_directions, both)
    assert cold_vm.call(open_sessions) == []
    assert found["vm0"].direction == "incoming"
    assert found["next"].direction == "outgoing"
    assert found[None].fd != found["vm0"].fd
    assert {holder.pid for holder in found.values()} == {worker}
    assert "'vm0', incoming, by 'python" in text
    assert "The device is open in 'python" in text
    assert f"live updates since the cold boot: {cold_vm.updates}" in text
    assert {holder["session"] for holder in data["held"]} == {"vm0", "next", None}
    assert data["image_loaded"] is False
    assert data["preservable"] > 256 << 20


def test_looking_at_a_session_leaves_it_as_it_is(vm: VM) -> None:
    vm.hold(guest_files.preserve, "vm0", 4096)
    assert len(vm.call(open_sessions)) == 1
    vm.live_update()
    session = vm.hold(guest_requests.retrieve, "vm0")
    assert [holder.direction for holder in vm.call(open_sessions)] == ["incoming"]
    assert vm.call(get_size_of_first_file, session) == 4096


def open_both_directions() -> tuple[LiveUpdate, IncomingSession, OutgoingSession]:
    device = LiveUpdate()
    return device, device.retrieve_session("vm0"), device.create_session("next")


def close_both_directions(both: tuple[LiveUpdate, IncomingSession, OutgoingSession]) -> None:
    device, incoming, outgoing = both
    device.close()
    incoming.finish()
    outgoing.discard()


def get_size_of_first_file(session: IncomingSession) -> int:
    with session.retrieve(1) as file:
        session.finish()
        return os.fstat(file.fileno()).st_size


def can_create_session() -> bool:
    with LiveUpdate() as device:
        device.create_session("s").discard()
    return True
