"""VMs of several VMMs live through an update that a coordinator makes; the host is a guest."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from kvm import guest_bridge, guest_vmm
from kvm.stream import Stream
from kvm.test_mini_vmm import LINES, check
from kvm.test_qemu_live_update import ADDRESS, PORT, resume, start

from pyluo.vm import VM, HarnessError
from tests.json_output import check_json
from update import guest_update

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

NAMES = ("one", "two")
SMALL = ("--memory", "24", "--cpus", "1", "--coordinator", os.fspath(guest_update.SOCKET))
DRY_RUNS = 10


@pytest.fixture(scope="module")
def host() -> Iterator[VM]:
    subprocess.run(["make", "-s", "-C", guest_vmm.MINI_VMM.parent], check=True)
    with VM("stable", cpus=2, call_timeout=300.0, silence=120.0) as vm:
        yield vm


def test_two_vms_live_through_an_update_and_what_comes_before_it(host: VM, kernel: Kernel) -> None:
    image = os.fspath(kernel.image)
    host.call(guest_update.serve)
    for name in NAMES:
        host.call(guest_vmm.start, "run", name, *SMALL)
    host.call(guest_update.wait_for_log, "takes part", len(NAMES))
    for name in NAMES:
        host.call(guest_vmm.wait_for_lines, name, LINES)
    assert host.call(guest_update.ask, "status")[0] == 0

    # As often as one likes, at no cost.
    options = ("--reuse-cmdline", "--limit", "60", "--expect", *NAMES)
    words = ("run", image, *options, "--dry-run")
    assert host.call(guest_update.ask, *words)[0] == 0
    before = host.call(guest_update.open_files)
    status, said = host.call(guest_update.ask, *words, "--rounds", str(DRY_RUNS))
    assert (status, said[-1]) == (0, {"failure": ""})
    for line in said:
        check_json("update run", line)
    for name in NAMES:
        assert [each["text"] for each in said if each.get("name") == name].count(
            "ready"
        ) == DRY_RUNS
    assert host.call(guest_update.open_files) == before
    for name in NAMES:
        check(host.call(guest_vmm.wait_for_lines, name, LINES), 1)

    # A VMM that hangs: all run on.
    host.call(guest_vmm.send_signal, "two", signal.SIGSTOP)
    status, said = host.call(guest_update.ask, "run", image, "--reuse-cmdline", "--limit", "2")
    assert (status, said[-1]["failure"]) == (1, "two: not ready within 2 s")
    host.call(guest_vmm.wait_for_lines, "one", LINES)
    host.call(guest_vmm.send_signal, "two", signal.SIGCONT)
    host.call(guest_vmm.wait_for_lines, "two", LINES)

    # A coordinator that dies: the VMs run on, and join the next one.
    assert host.call(guest_update.end_coordinator, signal.SIGKILL) == -signal.SIGKILL
    host.call(guest_update.serve)
    host.call(guest_update.wait_for_log, "takes part", 2 * len(NAMES))

    said_before = {name: host.call(guest_vmm.said, name) for name in NAMES}
    with pytest.raises(HarnessError, match="booted again"):
        pytest.fail(f"no jump: {host.call(guest_update.ask, 'run', image, *options)}")
    host.call(guest_update.serve)
    for name in NAMES:
        host.call(guest_vmm.start, "resume", name, *SMALL[-2:])
    host.call(guest_update.wait_for_log, "is resumed", len(NAMES))
    for name in NAMES:
        after = host.call(guest_vmm.wait_for_lines, name, LINES)
        # The VM was paused in the midst of a line, whose beginning went with the host's /tmp.
        last, first = check(said_before[name], 1)[-1], check(after.partition("\n")[2], 1)[0]
        assert first["changed0"] >= last["changed0"]
        assert first["stopped"] == last["stopped"] + 1
    status, said = host.call(guest_update.ask, "status")
    assert status == 0
    for line in said:
        check_json("update status", line)
    for name, each in zip(NAMES, said, strict=False):
        assert each["name"] == name
        assert "takes part, was paused for" in each["text"]
    for name in NAMES:
        assert host.call(guest_vmm.signal_and_wait_for_end, name, signal.SIGTERM) == 0
    assert host.call(guest_update.end_coordinator, signal.SIGTERM) == 0


def test_a_vm_of_qemu_keeps_its_connection_over_an_update(kernel: Kernel) -> None:
    """The coordinator makes the host's network again, before the VM comes back."""
    image = os.fspath(kernel.image)
    words = ("run", image, "--reuse-cmdline", "--limit", "120", "--expect", "net")
    joins = ("--coordinator", os.fspath(guest_update.SOCKET))
    for vmm in (guest_vmm.MINI_VMM, guest_vmm.QEMU):
        subprocess.run(["make", "-s", "-C", vmm.parent], check=True)
    with VM(
        "stable", cpus=2, memory=4 << 30, network=True, call_timeout=300.0, silence=120.0
    ) as host:
        host.call(guest_bridge.build, ["net"])
        host.call(guest_update.serve, "--network")
        start(host, kernel, "net", *joins, address=ADDRESS)
        host.call(guest_vmm.wait_for_text, "net", "vm boot=")
        with Stream(host.forward(PORT, ADDRESS)) as stream:
            stream.wait_for_more()
            assert host.call(guest_update.ask, *words, "--dry-run")[0] == 0
            stream.wait_for_more()

            # A VM that was stored by hand stays stored if the coordinator ends.
            host.call(guest_vmm.signal_and_wait, "net", signal.SIGUSR1, "is stored")
            assert host.call(guest_update.end_coordinator, signal.SIGTERM) == 0
            host.call(guest_update.serve, "--network")
            host.call(guest_update.wait_for_log, "net takes part", 2)
            # Nor does it run on after a round that it was stored for already.
            assert host.call(guest_update.ask, *words, "--dry-run")[0] == 0
            assert "runs on" not in host.call(guest_vmm.told, "net").rpartition("is stored")[2]
            host.call(guest_vmm.go_on, "net")
            stream.wait_for_more()

            with pytest.raises(HarnessError, match="booted again"):
                pytest.fail(f"no jump: {host.call(guest_update.ask, *words)}")
            host.call(guest_update.serve, "--network")
            resume(host, "net", *joins)
            host.call(guest_update.wait_for_log, "is resumed")
            stream.wait_for_more()
            stream.finish()
            status, said = host.call(guest_update.ask, "status")
            # Nothing of the network is missing: that would be a line of its own.
            assert (status, [each["name"] for each in said[:-1]]) == (0, ["net"])
            host.call(guest_vmm.end, "net")
