"""A VM lives through updates of its host's kernel; the host is a guest."""

from __future__ import annotations

import ast
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from kvm import guest_state, guest_vmm, readmes
from kvm.guest_vmm import changed_pages
from tests.snippets import command, snippets

if TYPE_CHECKING:
    from pyluo.vm import VM

README = "examples/mini_vmm/README.md"
LINES = 3  # of the VM, in each of its lives, at least
SMALL = ("--memory", "24", "--cpus", "1")


def parse(said: str) -> list[dict[str, int]]:
    """Return the whole lines of a VM that has said this in one or more lives of its VMM."""
    assert "exception" not in said, said
    lines = [line.split()[1:] for line in said.splitlines(keepends=True) if line.endswith("\n")]
    return [
        {name: int(value) for name, value in (word.split("=") for word in line)} for line in lines
    ]


def check(said: str, cpus: int) -> list[dict[str, int]]:
    """Check what a VM has said: nothing was wrong, and nothing stood still or went back."""
    lines = parse(said)
    for name in ("wrong", "backwards", "registers"):
        assert {line[name] for line in lines} == {0}, name
    growing = [f"{what}{cpu}" for what in ("changed", "ticks") for cpu in range(cpus)]
    for name in [*growing, "pit", "clock", "tsc"]:
        values = [line[name] for line in lines]
        assert values == sorted(values), name
        assert values[-1] > values[0], name
    return lines


def test_vms_go_on_where_they_were_jump_after_jump(host: VM) -> None:
    vms = {"one": 1, "two": 2}  # vCPUs
    said = dict.fromkeys(vms, "")
    for name, cpus in vms.items():
        host.call(guest_vmm.start, "run", name, "--cpus", str(cpus))
    for name in vms:
        host.call(guest_vmm.wait_for_lines, name, LINES)
    for jump in range(1, guest_vmm.hops(2) + 1):
        checksums = {}
        began = time.monotonic()
        for name in vms:
            said_before, checksums[name] = host.call(guest_vmm.store, name)
            said[name] += said_before
        paused = time.monotonic()
        host.live_update()
        for name in vms:
            in_store = host.call(guest_vmm.checksums_in_store, name)
            assert changed_pages(checksums[name], in_store) == []
        released = time.monotonic()
        for name in vms:
            host.call(guest_vmm.start, "resume", name)
        for name, cpus in vms.items():
            lines = check(said[name] + host.call(guest_vmm.wait_for_lines, name, LINES), cpus)
            ended = time.monotonic()
            assert lines[-1]["stopped"] == jump  # the VMM announced the pause through the clock
            # The VM's clock goes on as the host's does, which is set anew to about a second.
            gone = (lines[-1]["clock"] - parse(said[name])[-1]["clock"]) / 1e9
            assert released - paused - 2 < gone < ended - began + 3
            assert host.call(guest_vmm.own_memory, name) < 32 << 20
    for name in vms:
        host.call(guest_vmm.end, name)


def test_a_vm_that_was_stored_runs_on_if_the_jump_does_not_come(host: VM) -> None:
    host.call(guest_vmm.start, "run", "stays", "--memory", "24")
    host.call(guest_vmm.wait_for_lines, "stays", 1)
    for _ in range(5):
        said, checksums = host.call(guest_vmm.store, "stays")
        checksums_now = host.call(guest_vmm.checksums_of_process, "stays")
        assert changed_pages(checksums, checksums_now) == []  # nothing runs
        assert host.call(guest_vmm.said, "stays") == said
        host.call(guest_vmm.go_on, "stays")
        said = host.call(guest_vmm.wait_for_lines, "stays", 2)
    check(said, 2)
    host.call(guest_vmm.end, "stays")


# What is left of a VM whose VMM dies before a line, in the jump that follows.
DEATHS_BEFORE_THE_JUMP = {
    "_do:self._put_into_store()": False,
    "_put_into_store:self._machine.pause()": False,
    "_put_into_store:self._machine.save()": False,
    "_put_into_store:self._is_stored = True": True,
    '_put_into_store:tell(f"{self._name} is stored': True,
}


def test_a_vmm_that_dies_while_it_stores_a_vm_leaves_all_of_it_or_nothing(host: VM) -> None:
    names = {f"dying{number}": where for number, where in enumerate(DEATHS_BEFORE_THE_JUMP)}
    said = {}
    for name, where in names.items():
        host.call(guest_vmm.start, "run", name, *SMALL, killed_before=f"Vmm.{where}")
        host.call(guest_vmm.wait_for_lines, name, 1)
        status = host.call(guest_vmm.signal_and_wait_for_end, name, signal.SIGUSR1)
        assert status == -signal.SIGKILL
        said[name] = host.call(guest_vmm.said, name)
    host.live_update()
    for name, where in names.items():
        host.call(guest_vmm.start, "resume", name)
        if DEATHS_BEFORE_THE_JUMP[where]:
            check(said[name] + host.call(guest_vmm.wait_for_lines, name, LINES), 1)
            host.call(guest_vmm.end, name)
        else:
            status, told = host.call(guest_vmm.wait_for_end, name)
            assert status == 1
            assert "it was not stored" in told
            assert host.call(guest_vmm.finish_what_is_lost, name) == ["ram", "state"]


def lines_of_resume() -> list[str]:
    """Return each statement of the VMM's `resume` up to the renewal, as FUNCTION:TEXT."""
    source = guest_vmm.MINI_VMM.read_text()
    [function] = [
        each
        for each in ast.parse(source).body
        if isinstance(each, ast.FunctionDef) and each.name == "resume"
    ]
    lines = source.splitlines()
    texts = [lines[each.lineno - 1].strip() for each in function.body[1:]]
    return [
        f"resume:{text}"
        for text in texts[: texts.index("store = incoming.renew(wait=_PATIENCE)") + 1]
    ]


def test_a_vmm_that_dies_while_it_resumes_a_vm_can_be_started_again(host: VM) -> None:
    host.call(guest_vmm.start, "run", "again", *SMALL)
    host.call(guest_vmm.wait_for_lines, "again", LINES)
    said, checksums = host.call(guest_vmm.store, "again")
    host.live_update()
    places = lines_of_resume()
    assert len(places) == 10
    for place in places:
        host.call(guest_vmm.start, "resume", "again", killed_before=place)
        assert host.call(guest_vmm.wait_for_end, "again") == (-signal.SIGKILL, ""), place
        assert changed_pages(checksums, host.call(guest_vmm.checksums_in_store, "again")) == []
    # Renewed, but not yet running: the kernel gives out no file until the next jump.
    host.call(guest_vmm.start, "resume", "again", killed_before="resume:kvm.VmState.erase")
    assert host.call(guest_vmm.wait_for_end, "again")[0] == -signal.SIGKILL
    assert host.call(guest_vmm.entries_of_outgoing, "again") == ["ram", "state"]
    host.call(guest_vmm.start, "resume", "again")
    assert host.call(guest_vmm.wait_for_end, "again")[0] == 1
    host.live_update()
    assert changed_pages(checksums, host.call(guest_vmm.checksums_in_store, "again")) == []
    assert sorted(host.call(guest_vmm.resume_twice, "again"), key=str) == [1, None]
    check(said + host.call(guest_vmm.wait_for_lines, "again", LINES), 1)
    assert host.call(guest_vmm.signal_and_wait_for_end, "again", signal.SIGKILL) == -signal.SIGKILL
    # It died while the VM ran, as a host does that loses its power.
    assert host.call(guest_vmm.entries_of_outgoing, "again") == ["ram", "state"]
    host.call(guest_vmm.discard, "again")


def test_a_running_vm_moves_from_vmm_to_vmm(host: VM) -> None:
    socket = os.fspath(guest_vmm.control("moving"))
    host.call(guest_vmm.start, "run", "moving", *SMALL, "--socket", socket)
    host.call(guest_vmm.wait_for_lines, "moving", LINES)
    for number in range(1, 4):
        if number % 2:
            host.call(guest_vmm.start_successor, "moving", newer=True)
            host.call(guest_vmm.wait_for_message, "moving", "runs here", number)
            assert host.call(guest_vmm.end_of_predecessor, "moving") == 0
        else:
            host.call(guest_vmm.signal_and_wait, "moving", signal.SIGHUP, "runs here")
        lines = check(host.call(guest_vmm.wait_for_lines, "moving", LINES), 1)
        assert lines[-1]["stopped"] == number
    # It is in the store as before: it can still jump.
    said, checksums = host.call(guest_vmm.store, "moving")
    host.live_update()
    assert changed_pages(checksums, host.call(guest_vmm.checksums_in_store, "moving")) == []
    host.call(guest_vmm.start, "resume", "moving")
    check(said + host.call(guest_vmm.wait_for_lines, "moving", LINES), 1)
    host.call(guest_vmm.end, "moving")


# Whether the VM goes on in its successor if the VMM that has it dies before a line.
DEATHS_OF_THE_PREDECESSOR = {
    "self._machine.pause()": False,
    'successor.send(b"state")': True,
    '_expect(successor, b"restored")': True,
    'successor.send(b"go")': True,
}
# Where a successor dies, and the VM goes on in the VMM that has it.
DEATHS_OF_THE_SUCCESSOR = (
    "vm = Received(files)",
    'other.send(b"ready")',
    'other.send(b"restored")',
    '_expect(other, b"go")',
    "vm.start(other)",
)


def test_a_vm_whose_vmm_dies_while_it_moves_goes_on_in_the_other_one(host: VM) -> None:
    for number, (where, goes_on) in enumerate(DEATHS_OF_THE_PREDECESSOR.items()):
        name = f"left{number}"
        options = (*SMALL, "--socket", os.fspath(guest_vmm.control(name)))
        where = f"Vmm._hand_over:{where}"
        host.call(guest_vmm.start, "run", name, *options, killed_before=where)
        host.call(guest_vmm.wait_for_lines, name, 1)
        host.call(guest_vmm.start_successor, name)
        assert host.call(guest_vmm.end_of_predecessor, name) == -signal.SIGKILL
        if goes_on:
            host.call(guest_vmm.wait_for_message, name, "runs here")
            check(host.call(guest_vmm.wait_for_lines, name, LINES), 1)
            host.call(guest_vmm.end, name)
        else:
            status, told = host.call(guest_vmm.wait_for_end, name)
            assert status == 1
            assert "Nothing, or not all of it, was written there" in told
            host.call(guest_vmm.discard, name)


def test_a_vm_whose_successor_dies_while_it_moves_goes_on_where_it_was(host: VM) -> None:
    socket = os.fspath(guest_vmm.control("stays"))
    host.call(guest_vmm.start, "run", "stays", *SMALL, "--socket", socket)
    for number, where in enumerate(DEATHS_OF_THE_SUCCESSOR, 1):
        host.call(guest_vmm.wait_for_lines, "stays", 1)
        host.call(guest_vmm.start_successor, "stays", killed_before=f"take_over:{where}")
        assert host.call(guest_vmm.return_to_predecessor, "stays") == -signal.SIGKILL
        host.call(guest_vmm.wait_for_message, "stays", "stays: ", number)
    check(host.call(guest_vmm.wait_for_lines, "stays", LINES), 1)
    host.call(guest_vmm.end, "stays")


def test_the_readmes_commands_work_as_they_stand(host: VM) -> None:
    before, after = snippets(README, "sh")
    host.call(guest_vmm.run_shell, before)
    readmes.jump(host, README)
    shown = host.call(guest_vmm.run_shell, after)
    assert "vm0 runs again" in shown
    assert " wrong=0 backwards=0 registers=0" in shown
    host.call(guest_vmm.kill_vmms)
    host.call(guest_vmm.discard, "vm0")
    lines = [
        "cd examples/mini_vmm",
        command(README, 2),
        "until grep -q clock /tmp/vm0.log; do sleep 0.1; done",
        command(README, 3, {"newer/": ""}) + " 2>/tmp/vm0.newer &",
        'until grep "runs here" /tmp/vm0.newer; do sleep 0.1; done',
    ]
    assert "vm0 runs here" in host.call(guest_vmm.run_shell, "\n".join(lines))
    host.call(guest_vmm.kill_vmms)
    host.call(guest_vmm.discard, "vm0")


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_vm_that_was_restored_has_the_same_state_in_every_part(host: VM, cpus: int) -> None:
    assert host.call(guest_state.differences_after_restoring, cpus) == []
