"""Tests that need the kernel `debug`: its detectors, and its debug information.

Building that kernel takes too long for `make test`, which leaves this file out; `make soak` runs
it, and provokes each death PYLUO_ROUNDS times.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.panic import panic_message
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import cpu_curr
from sessions import guest_files

from deaths import guest_deaths
from deaths.provocations import ROUNDS, Provocation, lkdtm
from pyluo.vm import VM, Complaint, Death, GuestCrash, Kernel
from pyluo.vm.machine.vmcore import open_vmcore

if TYPE_CHECKING:
    from pathlib import Path

    import drgn

HEAP, BUGS = "drivers/misc/lkdtm/heap.c", "drivers/misc/lkdtm/bugs.c"


def panic_in_the_next_life(vm: VM) -> None:
    vm.live_update()
    vm.call(guest_deaths.provoke, "PANIC")


DEATHS = {
    "panic": Provocation(Complaint.PANIC, lkdtm("PANIC"), "dumptest", "lkdtm_PANIC+", BUGS),
    # Inline KASAN accesses the shadow of the address first, which is not mapped.
    "oops": Provocation(
        Complaint.OOPS, lkdtm("EXCEPTION"), "general protection fault", "lkdtm_EXCEPTION+", BUGS
    ),
    "panic in the next life": Provocation(
        Complaint.PANIC, panic_in_the_next_life, "dumptest", "lkdtm_PANIC+", BUGS, life=2
    ),
    "read after free": Provocation(
        Complaint.KASAN,
        lkdtm("READ_AFTER_FREE"),
        "slab-use-after-free in lkdtm_READ_AFTER_FREE+",
        "lkdtm_READ_AFTER_FREE+",
        HEAP,
    ),
    "write after free": Provocation(
        Complaint.KASAN,
        lkdtm("WRITE_AFTER_FREE"),
        "slab-use-after-free in lkdtm_WRITE_AFTER_FREE+",
        "lkdtm_WRITE_AFTER_FREE+",
        HEAP,
    ),
    "overflow of a slab": Provocation(
        Complaint.KASAN,
        lkdtm("SLAB_LINEAR_OVERFLOW"),
        "slab-out-of-bounds in lkdtm_SLAB_LINEAR_OVERFLOW+",
        "lkdtm_SLAB_LINEAR_OVERFLOW+",
        HEAP,
    ),
    "double free": Provocation(
        Complaint.KASAN,
        lkdtm("SLAB_FREE_DOUBLE"),
        "double-free in lkdtm_",
        "lkdtm_SLAB_FREE_DOUBLE+",
        HEAP,
    ),
    "fatal read after free": Provocation(
        Complaint.KASAN,
        lkdtm("READ_AFTER_FREE"),
        "slab-use-after-free in lkdtm_READ_AFTER_FREE+",
        "lkdtm_READ_AFTER_FREE+",
        HEAP,
        options=dict(append="kasan.fault=panic"),
    ),
    "lock kept": Provocation(
        Complaint.LOCKDEP,
        lambda vm: vm.call(guest_deaths.return_with_spinlock),
        "lock held when returning to user space",
        "lkdtm_do_action+",
        "drivers/misc/lkdtm/core.c",
    ),
    # The kept lock, which makes the context atomic, is reported first. The process then sleeps when
    # it closes the file; or, if a page fault kills it before, when it exits.
    "sleep with a lock": Provocation(
        Complaint.BUG,
        lambda vm: vm.call(guest_deaths.return_with_spinlock),
        "sleeping function called from invalid context",
        "__might_resched+",
        "kernel/sched/core.c",
        options=dict(expects=[Complaint.LOCKDEP]),
    ),
}


@pytest.mark.parametrize("name", DEATHS)
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_a_death_is_told_as_what_it_is_with_the_line_of_the_source(name: str, turn: int) -> None:
    del turn
    DEATHS[name].check("debug")


@pytest.mark.parametrize(
    ("kernel", "to", "cpus"),
    [("debug", "debug", 1), ("debug", "debug", 2), ("stable", "debug", 1), ("debug", "stable", 1)],
)
def test_memory_goes_over_twice_and_the_kernel_complains_of_nothing(
    kernel: str, to: str, cpus: int
) -> None:
    with VM(kernel, to=to, cpus=cpus) as vm:
        vm.hold(guest_files.preserve, "vm0", 1 << 20)
        vm.live_update()
        vm.hold(guest_files.preserve_again, "vm0")
        vm.live_update()
        assert vm.updates == 2
        assert vm.call(guest_files.inspect, "vm0")[0]


def list_calls(trace: drgn.StackTrace) -> dict[str, str]:
    """Return the kernel's functions on a stack, each with its source file."""
    found = {}
    for frame in trace:
        with suppress(LookupError):  # a frame of the process's own code
            found[frame.name] = frame.source()[0]
    return found


def list_sessions(program: drgn.Program) -> list[str]:
    """Return the names of the outgoing sessions, which the kernel lists nowhere."""
    head = program.object("luo_session_global").outgoing.list.address_of_()
    found = list_for_each_entry("struct luo_session", head, "list")
    return [session.name.string_().decode() for session in found]


def test_a_guest_that_lives_is_looked_into(tmp_path: Path) -> None:
    kernel = Kernel.find("debug")
    with VM(kernel) as vm:
        vm.live_update()  # addresses differ in each life
        vm.hold(guest_files.preserve, "vm0", 1 << 20)
        vm.call(guest_deaths.leave_sleeper, "sleeper")
        vm.dump(tmp_path / "core")
        banner = vm.call(guest_deaths.banner)
    program = open_vmcore(tmp_path / "core", kernel)
    assert program["linux_banner"].string_().decode() == banner
    assert program["init_uts_ns"].name.release.string_().decode() == kernel.release
    assert list_sessions(program) == ["vm0"]
    (sleeper,) = (task for task in for_each_task(program) if task.comm.string_() == b"sleeper")
    stack = list_calls(program.stack_trace(sleeper))
    assert stack["__do_sys_pause"].endswith("kernel/signal.c")
    assert stack["schedule"].endswith("kernel/sched/core.c")


def test_a_guest_that_panicked_is_looked_into(tmp_path: Path) -> None:
    kernel = Kernel.find("debug")
    with VM(kernel, vmcores=tmp_path) as vm, pytest.raises(GuestCrash) as caught:
        vm.call(guest_deaths.provoke, "PANIC")
    assert caught.value.vmcore is not None
    program = open_vmcore(caught.value.vmcore, kernel)
    message = panic_message(program)
    assert message is not None
    assert b"dumptest" in message
    stack = list_calls(program.stack_trace(cpu_curr(program, 0)))
    assert stack["vpanic"].endswith("kernel/panic.c")
    assert stack["lkdtm_PANIC"].endswith(BUGS)


def test_a_guest_that_fell_silent_is_looked_into_where_it_is(tmp_path: Path) -> None:
    """The dump is taken before the NMI that makes the kernel print where it is."""
    kernel = Kernel.find("debug")
    with VM(kernel, vmcores=tmp_path, silence=20) as vm, pytest.raises(GuestCrash) as caught:
        vm.call(guest_deaths.provoke, "HARDLOCKUP")
    assert caught.value.cause is Death.SILENT_HANG
    assert any("lkdtm_HARDLOCKUP+" in line and f"{BUGS}:" in line for line in caught.value.trace)
    assert caught.value.vmcore is not None
    program = open_vmcore(caught.value.vmcore, kernel)
    stack = list_calls(program.stack_trace(cpu_curr(program, 0)))
    assert stack["lkdtm_HARDLOCKUP"].endswith(BUGS)
    assert not any("panic" in name for name in stack)
