"""A service keeps the RAM of a VM while it is killed and restarted, and over live updates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pyluo
from pyluo.vm import VM, Kernel, Root
from stores import guest_vm_service

if TYPE_CHECKING:
    from collections.abc import Iterator

UPDATES = int(os.environ.get("PYLUO_SERVICE_UPDATES", 2))
RAM_MIB = int(os.environ.get("PYLUO_SERVICE_MIB", 32))
KERNELS = "previous", "stable"  # in turns
STEPS_OF_FIRST_LIFE = ["created", "added", "ready"]
STEPS = ["retrieved", "got", "finished", "ready"]
PROGRAM = f"python3 {Root.host_path(guest_vm_service.__file__)}"
ENVIRONMENT = f"PYTHONPATH={Root.host_path(Path(pyluo.__file__).parents[1])}"
UNIT = f"""\
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={PROGRAM}
Environment={ENVIRONMENT} RAM_MIB={RAM_MIB}
Environment="KILL_AFTER={" ".join(STEPS_OF_FIRST_LIFE + STEPS)}"
NotifyAccess=all
FileDescriptorStoreMax=16
FileDescriptorStorePreserve=yes
Restart=always
RestartSec=0

[Install]
WantedBy=multi-user.target
"""


HOLDING_UNIT = f"""\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={PROGRAM} hold
Environment={ENVIRONMENT}
"""


@pytest.fixture(scope="module")
def guest() -> Iterator[VM]:
    units = {"vm.service": UNIT, "hold.service": HOLDING_UNIT}
    first, second = KERNELS
    with VM(first, to=second, root="sid", memory=2 << 30, call_timeout=300, units=units) as vm:
        yield vm


def test_a_holder_outlives_the_service_that_started_it(guest: VM) -> None:
    for action in ("start", "stop"):
        done = guest.run(["systemctl", action, "hold.service"], timeout=120)
        assert done.returncode == 0, done.stderr
    [(session, group)] = guest.call(guest_vm_service.groups_of_holders)
    assert session == "held"
    assert group.endswith(".scope")
    guest.call(guest_vm_service.discard_held)


def test_a_vms_ram_outlives_kills_after_each_step_restarts_and_updates(guest: VM) -> None:
    state = guest.call(guest_vm_service.wait_until_ready)
    assert state["killed"] == STEPS_OF_FIRST_LIFE
    for update in range(1, UPDATES + 1):
        restarted = guest.run(["systemctl", "restart", "vm.service"], timeout=120)
        assert restarted.returncode == 0, restarted.stderr
        state = guest.call(guest_vm_service.wait_until_ready, state["pid"])
        assert (state["found"], state["entries"]) == ("opened", ["ram"])
        guest.live_update(by_systemctl=True)
        state = guest.call(guest_vm_service.wait_until_ready)
        assert state["killed"] == STEPS  # it compared the checksum before "got"
        assert (state["found"], state["entries"]) == ("opened", ["ram"])
        assert guest.life.release == Kernel.find(KERNELS[update % 2]).release
    assert guest.updates == UPDATES
