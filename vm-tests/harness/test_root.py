"""Tests of guests whose root is made of a suite of Debian, and whose first process is systemd."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pyluo
from harness import guest_actions, guest_root, guest_service
from pyluo.vm import VM, Complaint, GuestCrash, Root
from tests.snippets import run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT = f"""\
[Service]
Type=notify
ExecStart=python3 {Root.host_path(guest_service.__file__)}
Environment=PYTHONPATH={Root.host_path(Path(pyluo.__file__).parents[1])}
NotifyAccess=all
FileDescriptorStoreMax=4
FileDescriptorStorePreserve=yes

[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(scope="module")
def guest() -> Iterator[VM]:
    """A guest with a service of its own."""
    with VM(root="sid", units={"keeper.service": UNIT}) as vm:
        yield vm


def wait_until_up(vm: VM) -> str:
    """Wait until systemd has started everything, and return what it says of the system."""
    done = vm.run(["systemctl", "is-system-running", "--wait"], timeout=180)
    return done.stdout.decode().strip()


def test_the_first_process_is_systemd_and_starts_everything(guest: VM) -> None:
    assert wait_until_up(guest) == "running"
    assert guest.call(guest_root.first_process) == "systemd"


def test_the_python_is_the_roots_and_the_functions_are_the_hosts(guest: VM) -> None:
    system, version = guest.call(guest_root.describe)
    assert system == "debian"
    assert version != platform.python_version()
    point = guest_actions.Point(1, "a")
    assert guest.call(guest_actions.echo, point) == point


def test_programs_write_where_they_expect_to(guest: VM) -> None:
    assert guest.call(guest_root.write_and_read, "text") == ["text"] * 4
    assert guest.run(["touch", "/etc/file", "/usr/file"]).returncode == 1


def test_a_program_runs_in_the_hosts_current_folder(
    guest: VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("the host's")
    monkeypatch.chdir(tmp_path)
    assert guest.run(["cat", "file"]).stdout == b"the host's"
    assert guest.run(["pwd", "-P"]).stdout.decode().strip() == guest.path(tmp_path)


def test_the_worker_jumps_and_what_it_holds_is_kept(guest: VM) -> None:
    lives = guest.life.number
    guest.hold(guest_root.preserve, b"kept")
    guest.live_update()
    assert guest.life.number == lives + 1
    assert guest.call(guest_root.retrieve, 4) == b"kept"
    assert guest.call(guest_root.first_process) == "systemd"


def test_systemd_jumps_and_a_service_gets_its_descriptors_back(guest: VM) -> None:
    assert wait_until_up(guest) == "running"
    updates = guest.updates
    assert updates is not None
    before = guest.call(guest_service.state)
    guest.hold(guest_root.preserve, b"held")
    timeline = guest.live_update(by_systemctl=True)
    assert [event.name for event in timeline.events] == [
        "loaded", "systemctl called", "first sign of the new kernel", "worker up"
    ]  # fmt: skip
    assert guest.updates == updates + 1
    assert guest.call(guest_root.retrieve, 4) == b"held"
    assert wait_until_up(guest) == "running"
    after = guest.call(guest_service.state)
    assert after == {"names": "keeper", "content": before["written"], "written": "again"}


@pytest.mark.expects(Complaint.PANIC)
def test_a_worker_that_ends_is_the_guests_death() -> None:
    with VM(root="sid", expects=[Complaint.PANIC]) as vm:
        with pytest.raises(GuestCrash) as caught:
            vm.call(guest_actions.end_worker)
        assert caught.value.cause is Complaint.PANIC
        assert any("the worker ended, wait status 0x300" in line for line in caught.value.console)


def test_a_root_is_built_and_used_by_commands(tmp_path: Path) -> None:
    page = "docs/guides/roots.md"
    built = run_command(page, 0)
    assert built.returncode == 0, built.stderr
    assert os.fspath(Root.find("sid").folder) in built.stdout
    shown = run_command(page, 1)
    assert shown.stdout.startswith("systemd "), shown.stderr
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text(
        "def test_it(vm): assert vm.run(['cat', '/proc/1/comm']).stdout == b'systemd\\n'\n"
    )
    tested = run_command(page, 2, cwd=tmp_path)
    assert "1 passed" in tested.stdout, tested.stdout


def test_a_guest_on_the_hosts_root_has_no_systemd_to_jump(shared_vm: VM) -> None:
    with pytest.raises(ValueError, match="has systemd"):
        shared_vm.live_update(by_systemctl=True)
    assert shared_vm.call(os.getpid)
