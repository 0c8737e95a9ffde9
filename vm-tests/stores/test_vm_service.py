"""A service keeps the RAM of a VM while it is killed and restarted, and over live updates."""

from __future__ import annotations

from pathlib import Path

import pyluo
from pyluo.vm import VM, Root
from stores import guest_vm_service

UPDATES = 5
STEPS_OF_FIRST_LIFE = ["created", "added", "ready"]
STEPS = ["retrieved", "got", "finished", "ready"]
UNIT = f"""\
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=python3 {Root.host_path(guest_vm_service.__file__)}
Environment=PYTHONPATH={Root.host_path(Path(pyluo.__file__).parents[1])}
Environment="KILL_AFTER={" ".join(STEPS_OF_FIRST_LIFE + STEPS)}"
NotifyAccess=all
FileDescriptorStoreMax=16
FileDescriptorStorePreserve=yes
Restart=always
RestartSec=0

[Install]
WantedBy=multi-user.target
"""


def test_a_vms_ram_outlives_kills_after_each_step_restarts_and_five_updates() -> None:
    with VM(
        "previous",
        to="stable",
        root="sid",
        memory=2 << 30,
        call_timeout=300,
        units={"vm.service": UNIT},
    ) as vm:
        state = vm.call(guest_vm_service.wait_until_ready)
        assert state["killed"] == STEPS_OF_FIRST_LIFE
        for update in range(1, UPDATES + 1):
            restarted = vm.run(["systemctl", "restart", "vm.service"], timeout=120)
            assert restarted.returncode == 0, restarted.stderr
            state = vm.call(guest_vm_service.wait_until_ready, state["pid"])
            assert (state["found"], state["entries"]) == ("opened", ["ram"])
            vm.live_update(by_systemctl=True)
            state = vm.call(guest_vm_service.wait_until_ready)
            assert state["killed"] == STEPS  # it compared the checksum before "got"
            assert (state["found"], state["entries"]) == ("opened", ["ram"])
            assert vm.life.release.startswith("7.3" if update % 2 else "7.2")
        assert vm.updates == UPDATES
