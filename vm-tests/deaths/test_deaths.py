"""Provoke each way for a guest to die, and check what the harness reports.

Those that only a kernel with debug information can report are in test_debug_kernel.py.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from deaths import guest_deaths
from deaths.provocations import ROUNDS, Provocation, lkdtm, make_endless_loop
from pyluo.vm import VM, Complaint, Death, GuestCrash, HarnessError, Kernel, KernelComplaint
from pyluo.vm.machine import faults

if TYPE_CHECKING:
    from pathlib import Path


def kill_qemu(vm: VM) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    vm.call(time.sleep, 60)


def quit_qemu(vm: VM) -> None:
    vm.qmp("quit")
    vm.call(time.sleep, 60)


def jump_with_blocked_reboot(vm: VM) -> None:
    vm.call(guest_deaths.block_reboot)
    vm.live_update("stable")


DEATHS = {
    "panic": Provocation(Complaint.PANIC, lkdtm("PANIC"), "dumptest", "lkdtm_PANIC+"),
    "oops": Provocation(
        Complaint.OOPS, lkdtm("EXCEPTION"), "NULL pointer dereference", "lkdtm_EXCEPTION+"
    ),
    "overflow": Provocation(
        Complaint.OOPS, lkdtm("EXHAUST_STACK"), "stack guard page", "recursive_loop+"
    ),
    "bug": Provocation(
        Complaint.BUG, lkdtm("BUG"), "kernel BUG at drivers/misc/lkdtm", "lkdtm_BUG+"
    ),
    "warning": Provocation(Complaint.WARNING, lkdtm("WARNING"), "bugs.c", "lkdtm_do_action+"),
    "fatal warning": Provocation(
        Complaint.WARNING,
        lkdtm("WARNING_MESSAGE"),
        "bugs.c",
        "lkdtm_WARNING_MESSAGE+",
        options=dict(append="panic_on_warn=1"),
    ),
    "soft lockup": Provocation(
        Complaint.SOFT_LOCKUP,
        lkdtm("SOFTLOCKUP"),
        "soft lockup - CPU#",
        "lkdtm_SOFTLOCKUP+",
        options=dict(cpus=2, append="watchdog_thresh=1"),
    ),
    "fatal soft lockup": Provocation(
        Complaint.SOFT_LOCKUP,
        lkdtm("SOFTLOCKUP"),
        "soft lockup - CPU#",
        "lkdtm_SOFTLOCKUP+",
        options=dict(append="watchdog_thresh=1 softlockup_panic=1"),
    ),
    # The kernel prints in a thread, which cannot run here: only an NMI makes it print its messages.
    "soft lockup of the only CPU": Provocation(
        Complaint.SOFT_LOCKUP,
        lkdtm("SOFTLOCKUP"),
        "soft lockup - CPU#0",
        "lkdtm_SOFTLOCKUP+",
        prints=False,
        options=dict(append="watchdog_thresh=1"),
    ),
    "hard lockup": Provocation(
        Complaint.HARD_LOCKUP,
        lkdtm("HARDLOCKUP"),
        "hard LOCKUP on cpu",
        "lkdtm_HARDLOCKUP+",
        options=dict(cpus=2, append="watchdog_thresh=1 nosoftlockup"),
    ),
    "stall": Provocation(
        Complaint.RCU_STALL,
        lambda vm: vm.call(guest_deaths.lock_up_while_rcu_waits),
        "rcu_preempt",
        "lkdtm_SOFTLOCKUP+",
        options=dict(cpus=2, append="nosoftlockup rcupdate.rcu_cpu_stall_timeout=3"),
    ),
    "hung task": Provocation(
        Complaint.HUNG_TASK,
        lkdtm("HUNG_TASK"),
        "blocked for more than",
        "lkdtm_HUNG_TASK+",
        options=dict(append="sysctl.kernel.hung_task_timeout_secs=1"),
    ),
    "silence": Provocation(
        Death.SILENT_HANG,
        lkdtm("HARDLOCKUP"),
        "nothing for",
        "lkdtm_HARDLOCKUP+",
        prints=False,
    ),
    "silence of both CPUs": Provocation(
        Death.SILENT_HANG,
        lambda vm: vm.call(guest_deaths.lock_up_both_cpus),
        "nothing for",
        "lkdtm_HARDLOCKUP+",
        cpus=2,
        prints=False,
        options=dict(cpus=2, append=faults.SPARE_PROCESSOR),
    ),
    "no answer": Provocation(
        Death.HANG,
        lambda vm: vm.call(time.sleep, 60),
        "no answer within",
        "write_sysrq_trigger+",
        prints=False,
        options=dict(call_timeout=2),
    ),
    "panic in the next life": Provocation(
        Complaint.PANIC,
        lambda vm: vm.live_update(append="rootfstype=ext4"),
        "VFS: Unable to mount root",
        life=2,
    ),
    "no landing": Provocation(
        Death.LANDING,
        partial(VM.live_update, append="rootdelay=3600"),
        "no word from the next kernel within 15 s",
        "start_kernel+",
        prints=False,
        options=dict(boot_timeout=15, silence=45),
        life=2,
    ),
    "old kernel that does not leave": Provocation(
        Death.HANG,
        jump_with_blocked_reboot,
        "no word from the next kernel within 15 s",
        "write_sysrq_trigger+",
        prints=False,
        options=dict(boot_timeout=15),
    ),
    "panic that only QEMU hears of": Provocation(
        Complaint.PANIC,
        lambda vm: vm.call(guest_deaths.panic_without_console),
        "QEMU reports",
        prints=False,
    ),
    "reset": Provocation(
        Death.RESET,
        lambda vm: vm.call(guest_deaths.reset),
        "the guest reset its machine",
        prints=False,
    ),
    "QEMU killed": Provocation(Death.QEMU, kill_qemu, "SIGKILL", prints=False),
    "QEMU ended": Provocation(Death.QEMU, quit_qemu, "exit status 0", prints=False),
}


@pytest.mark.parametrize("name", DEATHS)
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_a_death_is_told_as_what_it_is_with_where_it_happened(name: str, turn: int) -> None:
    del turn
    DEATHS[name].check("selftest")


def test_a_guest_that_never_spoke_is_told_as_such() -> None:
    silent = VM("selftest", append="rootdelay=3600", boot_timeout=8)
    with pytest.raises(GuestCrash) as caught, silent:
        pytest.fail("a kernel that waits for its root an hour has spoken")
    assert (caught.value.cause, caught.value.booted) == (Death.SILENT, False)
    assert any("Linux version" in line for line in caught.value.console)


def test_where_the_cpus_are_is_told_even_if_no_nmi_reaches_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(
        make_endless_loop(Kernel.find("selftest").image.read_bytes())
    )
    silent = VM(tmp_path / "bzImage", boot_timeout=3)
    with pytest.raises(GuestCrash) as caught, silent:
        pytest.fail("a kernel that goes round in its first instruction has spoken")
    assert caught.value.cause is Death.SILENT
    (place,) = caught.value.trace
    assert re.fullmatch(r"CPU: 0 at [0-9a-f]+", place)


def test_a_guest_that_is_stopped_on_purpose_is_not_hung() -> None:
    with VM("selftest", silence=2) as vm:
        vm.qmp("stop")
        time.sleep(4)  # twice the allowed silence
        vm.qmp("cont")
        assert vm.call(os.getpid) > 1


def test_a_guest_whose_memory_is_written_is_not_hung(tmp_path: Path) -> None:
    core = tmp_path / "core"
    os.mkfifo(core)
    with VM("selftest", silence=5.0) as vm:

        def read_late() -> None:
            with core.open("rb", buffering=0) as file:
                time.sleep(vm.silence + 1)
                while file.read(1 << 20):
                    pass

        reader = threading.Thread(target=read_late)
        reader.start()
        vm.dump(core)  # QEMU stops the guest meanwhile, for longer than it may be silent
        reader.join()
        assert vm.call(os.getpid) > 1


def test_an_answer_that_comes_too_late_does_not_change_the_verdict() -> None:
    with VM("selftest", call_timeout=2) as vm, pytest.raises(GuestCrash) as caught:
        vm.call(time.sleep, 2.3)  # ends before the harness has found out where the CPUs are
    assert caught.value.cause is Death.HANG


def test_the_last_words_of_qemu_are_told() -> None:
    with VM("selftest") as vm:
        os.kill(vm.pid, signal.SIGTERM)
        with pytest.raises(GuestCrash) as caught:
            vm.call(time.sleep, 60)
    assert "exit status 0; it said: " in caught.value.reason
    assert "terminating on signal 15" in caught.value.reason


def test_a_guest_that_is_stopped_on_purpose_gives_no_answer() -> None:
    with VM("selftest", call_timeout=2) as vm:
        vm.qmp("stop")
        with pytest.raises(GuestCrash) as caught:
            vm.call(os.getpid)
    assert caught.value.cause is Death.HANG


def test_a_long_call_is_no_silence() -> None:
    with VM("selftest", silence=3) as vm:
        vm.call(time.sleep, 8)


def test_a_warning_that_is_expected_is_none_and_the_next_is_one_again() -> None:
    with VM("selftest") as vm:
        with vm.expecting(Complaint.WARNING):
            vm.call(guest_deaths.provoke, "WARNING")
        assert [report.complaint for report in vm.reports] == [Complaint.WARNING]
        vm.call(guest_deaths.provoke, "WARNING")
        with pytest.raises(KernelComplaint) as caught:
            vm.check()
        assert caught.value.cause is Complaint.WARNING
        vm.check()  # reports it only once


def test_what_is_expected_does_not_excuse_what_is_not() -> None:
    with VM("selftest", expects=[Complaint.LOCKDEP]) as vm:
        vm.call(guest_deaths.provoke, "WARNING")
        with pytest.raises(KernelComplaint):
            vm.check()


def test_a_death_that_nobody_noticed_fails_the_block_unless_it_is_expected() -> None:
    with pytest.raises(GuestCrash) as caught, VM("selftest") as vm:
        die_unnoticed(vm)
    assert caught.value.cause is Complaint.PANIC
    with VM("selftest", expects=[Complaint.PANIC]) as vm:
        die_unnoticed(vm)


def test_a_watch_that_failed_fails_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("postmortem.trace", "watch.GuestCrash"):
        monkeypatch.setattr(f"pyluo.vm.machine.{name}", None)
    with pytest.raises(HarnessError, match="failed to watch the guest"), VM("selftest") as vm:
        die_unnoticed(vm)


def test_a_death_that_was_told_does_not_excuse_what_came_before() -> None:
    with pytest.raises(KernelComplaint) as caught, VM("selftest") as vm:
        warn_and_die(vm)
    assert caught.value.cause is Complaint.WARNING


def warn_and_die(vm: VM) -> None:
    vm.call(guest_deaths.provoke, "WARNING")
    while not vm.reports:  # the kernel prints in a thread
        time.sleep(0.05)
    with pytest.raises(GuestCrash, match="dumptest"):
        vm.call(guest_deaths.provoke, "PANIC")


def test_a_kernel_that_booted_quietly_is_heard_when_it_warns() -> None:
    with pytest.raises(KernelComplaint) as caught, VM("selftest", append="quiet") as vm:
        vm.call(guest_deaths.provoke, "WARNING")
    assert caught.value.cause is Complaint.WARNING


def test_warnings_that_would_not_be_heard_are_told() -> None:
    with pytest.raises(HarnessError, match=r"serial line.*leave it at 6"), VM("selftest") as vm:
        vm.run(["dmesg", "-n", "1"])


def die_unnoticed(vm: VM) -> None:
    vm.call(guest_deaths.provoke_soon, "PANIC")
    while not vm.dead:
        time.sleep(0.05)


def test_a_test_that_passed_fails_if_a_kernel_warned_unless_it_expects_that(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        from pathlib import Path

        import pytest

        from pyluo.vm import Complaint

        def warn():
            Path("/sys/kernel/debug/provoke-crash/DIRECT").write_text("WARNING")

        def test_warns(vm):
            vm.call(warn)

        def test_warns_in_a_shared_guest(shared_vm):
            shared_vm.call(warn)

        @pytest.mark.expects(Complaint.WARNING)
        def test_expects_it(vm):
            vm.call(warn)

        @pytest.mark.expects(Complaint.WARNING)
        def test_expects_it_of_a_shared_guest(shared_vm):
            shared_vm.call(warn)

        def test_does_not_warn(shared_vm):
            shared_vm.call(id, 1)

        @pytest.fixture
        def warns_late(vm):
            yield
            vm.call(warn)

        def test_warns_when_it_is_over(warns_late):
            pass

        @pytest.fixture
        def shared_warns_late(shared_vm):
            yield
            shared_vm.call(warn)

        def test_warns_in_a_shared_guest_when_it_is_over(shared_warns_late):
            pass

        def test_has_a_shared_guest_of_its_own(shared_vm):
            shared_vm.call(id, 1)

        @pytest.mark.expects(Complaint.WARNING)
        def test_expects_it_when_it_is_over(warns_late):
            pass

        def test_fails_by_itself(vm):
            vm.call(warn)
            assert False

        def test_closes_its_guest(vm):
            vm.call(id, 1)
            vm.close()
        """
    )
    outcome = pytester.runpytest_subprocess("--pyluo-kernel=selftest")
    outcome.assert_outcomes(passed=8, failed=3, errors=2)
    outcome.stdout.fnmatch_lines(["*KernelComplaint: kernel warning: drivers/misc/lkdtm/bugs.c*"])
