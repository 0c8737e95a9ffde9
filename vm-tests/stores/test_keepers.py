"""Tests of keepers: what they have when a process ends at any moment."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import VM
from stores import guest_keepers

if TYPE_CHECKING:
    from pyluo.vm import Kernel

PYLUO = os.fspath(Path(sys.executable).parent / "pyluo")
RENEWALS = int(os.environ.get("PYLUO_RENEWALS", "10"))


def test_a_holder_keeps_what_it_is_given_and_ends_with_the_last_of_it(vm: VM) -> None:
    nothing, no_process, sizes, again_nothing, ended, sockets = vm.call(guest_keepers.use_a_holder)
    assert (nothing, no_process) == ({}, "no process")
    assert sizes == {"x": 2, "y": 1}
    assert (again_nothing, ended) == ({}, "no process")
    assert sockets == ["lock"]


def test_an_embedded_python_names_the_interpreter_of_its_holder(vm: VM) -> None:
    (number, told), (wrong, wrong_told), kept = vm.call(guest_keepers.hold_without_an_interpreter)
    assert number == wrong == errno.ENOENT
    assert "HolderProcess(python='/usr/bin/python3')" in told
    assert "/no/python" in wrong_told
    assert kept == ["x"]


def test_a_store_is_taken_over_by_the_next_process_and_discarded_by_name(vm: VM) -> None:
    held, taken, names, number, is_current, unknown, required, left = vm.call(
        guest_keepers.create_open_and_discard
    )
    assert held == ["s"]
    assert "OutgoingStore.open('s') takes it over" in taken
    assert names == ["0", "1"]
    assert (number, is_current) == (700, True)
    assert "No keeper has it" in unknown
    assert required == "'s'"
    assert left == []


def test_a_store_is_taken_over_from_a_process_that_died_while_it_added_a_file(vm: VM) -> None:
    assert vm.call(guest_keepers.take_over_what_a_dead_process_was_adding, "s") == ["0"]
    vm.live_update()
    assert vm.call(guest_keepers.list_and_finish, "s") == (["0", "1"], True)


def test_a_process_that_loses_its_holder_gets_another_one(vm: VM) -> None:
    assert vm.call(guest_keepers.lose_the_holder) == (["0", "1"], True)


def test_an_object_that_another_one_has_overtaken_does_not_damage_the_table(vm: VM) -> None:
    assert vm.call(guest_keepers.write_from_two_objects) == (errno.ESTALE, ["0", "1"])


def test_a_store_is_kept_again_when_it_is_closed_and_its_holder_is_dead(vm: VM) -> None:
    assert vm.call(guest_keepers.close_without_the_holder) == ["0"]


def test_a_request_that_makes_no_sense_costs_a_holder_nothing(vm: VM) -> None:
    assert vm.call(guest_keepers.send_odd_requests) == 1


def test_a_renewal_leaves_another_store_of_its_name_alone(vm: VM) -> None:
    vm.call(guest_keepers.make, "s")
    vm.live_update()
    refusal, is_intact, names = vm.call(guest_keepers.renew_beside_another_store, "s")
    assert (refusal, is_intact, names) == ("SessionExistsError", True, ["0"])


def test_a_renewal_that_is_killed_at_any_line_loses_nothing(kernel: Kernel) -> None:
    with VM(kernel, call_timeout=600) as vm:
        vm.call(guest_keepers.make_for_renewals, RENEWALS)
        vm.live_update()
        killed, ways = vm.call(guest_keepers.kill_renewals, RENEWALS)
        assert killed == RENEWALS - 1
        assert min(ways.values()) > 0
        vm.live_update()
        assert vm.call(guest_keepers.check_renewals, RENEWALS) == RENEWALS


def test_the_session_of_a_refused_store_stays_open_when_the_store_is_dropped(vm: VM) -> None:
    vm.hold(guest_keepers.make_no_store, "plain")
    vm.live_update()
    assert vm.call(guest_keepers.take_the_session_from_the_refusal, "plain") == 4096


def test_a_parcel_takes_ten_thousand_files(shared_vm: VM) -> None:
    assert shared_vm.call(guest_keepers.pack, 10_000) == 10_000


def test_a_jump_is_refused_unless_the_required_sessions_are_held(vm: VM) -> None:
    vm.call(guest_keepers.make, "s")
    refused = vm.run([PYLUO, "kexec", "reboot", "--require", "s", "t"])
    assert refused.returncode == 1
    assert b"'t'" in refused.stderr
    assert b"'s'" not in refused.stderr
    assert vm.run([PYLUO, "discard", "--force", "s"]).returncode == 0


@pytest.mark.in_guest
def test_the_name_of_pid_1_is_refused_with_the_reason() -> None:
    from pyluo import LiveUpdate, SessionNameError

    with LiveUpdate() as device, pytest.raises(SessionNameError, match="systemd"):
        device.create_session("systemd")
