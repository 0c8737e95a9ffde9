from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Complaint
from pyluo.vm.machine.console import Console

if TYPE_CHECKING:
    from pyluo.vm.machine.report import Report


@dataclass
class Callbacks:
    """The calls that a console made."""

    beginnings: int = 0
    reports: list[tuple[Complaint, str]] = field(default_factory=list)
    deaths: list[tuple[Complaint, str]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)


def feed_console(*chunks: bytes) -> tuple[Callbacks, Console]:
    """Feed a console with chunks of output, and return its callbacks and the console."""

    async def feed() -> tuple[Callbacks, Console]:
        calls = Callbacks()

        def on_begin(_: float) -> None:
            calls.beginnings += 1

        def on_complaint(report: Report) -> None:
            calls.reports.append((report.complaint, report.reason))

        def on_death(report: Report) -> None:
            calls.deaths.append((report.complaint, report.reason))
            calls.trace = report.lines

        console = Console(on_begin, on_complaint, on_death)
        stream = asyncio.StreamReader()
        for chunk in chunks:
            stream.feed_data(chunk)
        stream.feed_eof()
        await console.read(stream)
        return calls, console

    return asyncio.run(feed())


@pytest.mark.parametrize(
    ("line", "complaint", "reason"),
    [
        ("Kernel panic - not syncing: Fatal exception", Complaint.PANIC, "Fatal exception"),
        (
            "Oops: general protection fault: 0000 [#1]",
            Complaint.OOPS,
            "Oops: general protection fault",
        ),
        ("kernel BUG at mm/slub.c:1!", Complaint.BUG, "kernel BUG at mm"),
        (
            "BUG: unable to handle page fault for address: f",
            Complaint.OOPS,
            "BUG: unable to handle",
        ),
        ("BUG: TASK stack guard page was hit at f", Complaint.OOPS, "BUG: TASK stack guard page"),
        ("BUG: kernel NULL pointer dereference, address: 0", Complaint.OOPS, "BUG: kernel NULL"),
    ],
)
def test_a_deadly_line_is_told_as_what_it_is(line: str, complaint: Complaint, reason: str) -> None:
    calls, _ = feed_console(f"[    1.0] {line}\r\n".encode())
    ((cause, text),) = calls.deaths
    assert cause is complaint
    assert text.startswith(reason)


@pytest.mark.parametrize(
    "line", ["PANIC: early exception 0x0e IP 10:ffffffff81000000 error 0", " -- System halted"]
)
def test_a_kernel_that_dies_before_it_can_stamp_its_words_has_begun(line: str) -> None:
    calls, _ = feed_console(b"[    1.0] a line of the kernel before\r\n", line.encode() + b"\r\n")
    assert calls.deaths == [(Complaint.PANIC, line.strip())]
    assert calls.beginnings == 1


@pytest.mark.parametrize(
    "line",
    [
        "DEBUG: all is well",
        "[    1.0] DEBUG: all is well",
        "[    1.0] Kernel command line: panic=0 oops=panic",
        "[    1.0] Spectre V2 : WARNING: Unprivileged eBPF is enabled",
        "[    1.0] rcu: INFO: Stall ended before state dump start",
        "[    1.0] INFO: task a:1 is blocked on a mutex likely owned by task b:2.",
        "a test says: Kernel panic - not syncing: no",
        "a test says: WARNING: a/b.c:1 at c",
    ],
)
def test_a_harmless_line_is_no_report(line: str) -> None:
    calls, _ = feed_console(line.encode() + b"\n")
    assert (calls.reports, calls.deaths) == ([], [])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("WARNING: kernel/a.c:12 at b+0x1/0x2, CPU#0: c/1", Complaint.WARNING),
        ("WARNING: CPU: 0 PID: 1 at kernel/a.c:12 b+0x1/0x2", Complaint.WARNING),
        ("UBSAN: array-index-out-of-bounds in a.c:1:2", Complaint.WARNING),
        ("BUG: KASAN: slab-use-after-free in b+0x1/0x2", Complaint.KASAN),
        ("BUG: sleeping function called from invalid context at a.c:1", Complaint.BUG),
        ("WARNING: possible circular locking dependency detected", Complaint.LOCKDEP),
        ("WARNING: possible recursive locking detected", Complaint.LOCKDEP),
        ("WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected", Complaint.LOCKDEP),
        ("WARNING: lock held when returning to user space!", Complaint.LOCKDEP),
        ("WARNING: python3/12 still has locks held!", Complaint.LOCKDEP),
        ("WARNING: suspicious RCU usage", Complaint.LOCKDEP),
        ("INFO: trying to register non-static key.", Complaint.LOCKDEP),
        ("[ BUG: Invalid wait context ]", Complaint.LOCKDEP),
        ("rcu: INFO: rcu_preempt self-detected stall on CPU", Complaint.RCU_STALL),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", Complaint.RCU_STALL),
        (
            "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }",
            Complaint.RCU_STALL,
        ),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [a:1]", Complaint.SOFT_LOCKUP),
        ("watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 0", Complaint.HARD_LOCKUP),
        ("INFO: task a:1 blocked for more than 120 seconds.", Complaint.HUNG_TASK),
        ("INFO: task a:1 blocked in I/O wait for more than 120 seconds.", Complaint.HUNG_TASK),
    ],
)
def test_what_a_kernel_may_survive_is_reported_and_no_death(
    line: str, complaint: Complaint
) -> None:
    calls, _ = feed_console(f"[    1.0] {line}\n".encode())
    assert [cause for cause, _ in calls.reports] == [complaint]
    assert calls.deaths == []


@pytest.mark.parametrize(
    ("report", "panic", "complaint"),
    [
        ("WARNING: a.c:1 at b", "kernel: panic_on_warn set ...", Complaint.WARNING),
        ("BUG: KASAN: slab-use-after-free in b", "KASAN: panic_on_warn set ...", Complaint.KASAN),
        ("watchdog: BUG: soft lockup - CPU#0", "softlockup: hung tasks", Complaint.SOFT_LOCKUP),
        ("watchdog: CPU1: Watchdog detected hard LOCKUP", "Hard LOCKUP", Complaint.HARD_LOCKUP),
        ("rcu: INFO: rcu_preempt self-detected stall", "RCU Stall", Complaint.RCU_STALL),
        (
            "INFO: task a:1 blocked for more than 1 s",
            "hung_task: blocked tasks",
            Complaint.HUNG_TASK,
        ),
        ("WARNING: a.c:1 at b", "Attempted to kill init!", Complaint.PANIC),
        ("watchdog: BUG: soft lockup - CPU#0", "RCU Stall", Complaint.RCU_STALL),
    ],
)
def test_a_panic_is_told_as_what_it_is_the_consequence_of(
    report: str, panic: str, complaint: Complaint
) -> None:
    calls, _ = feed_console(f"[1.0] {report}\n[1.1] Kernel panic - not syncing: {panic}\n".encode())
    assert [cause for cause, _ in calls.deaths] == [complaint]


def test_what_follows_the_first_word_of_a_death_belongs_to_its_trace() -> None:
    calls, _ = feed_console(
        b"[1.0] kernel BUG at a.c:1!\n[1.1] Oops: invalid opcode\n[1.2] RIP: 0010:b+0x1/0x2\n"
        b"[1.3] Kernel panic - not syncing: Fatal exception\n"
        b"[1.4] ---[ end Kernel panic - not syncing: Fatal exception ]---\n[1.5] after\n"
    )
    assert calls.deaths == [(Complaint.BUG, "kernel BUG at a.c:1!")]
    assert [line[:5] for line in calls.trace] == ["[1.0]", "[1.1]", "[1.2]", "[1.3]", "[1.4]"]


def test_a_report_of_one_life_explains_no_panic_of_the_next() -> None:
    calls, _ = feed_console(
        b"[9.0] WARNING: a.c:1 at b\n[0.0] Linux version 7\n"
        b"[0.1] Kernel panic - not syncing: kernel: panic_on_warn set ...\n"
    )
    assert [cause for cause, _ in calls.deaths] == [Complaint.PANIC]


def test_a_report_ends_where_the_next_begins() -> None:
    _, console = feed_console(
        b"[1.0] WARNING: lock held when returning to user space!\n[1.1] 1 lock held by a/1\n"
        b"[1.2] BUG: sleeping function called from invalid context at a.c:1\n[1.3]  b+0x1/0x2\n"
    )
    assert [[line[:5] for line in report.lines] for report in console.reports] == [
        ["[1.0]", "[1.1]"],
        ["[1.2]", "[1.3]"],
    ]


def test_a_character_cut_in_two_is_one_character() -> None:
    assert "ü" in feed_console(b"\xc3", b"\xbc\n")[1].text


def test_a_line_cut_in_two_is_one_line() -> None:
    calls, console = feed_console(b"[0.0] Linux ver", b"sion 7.3.4 (x)\n", b"unfinished")
    assert calls.beginnings == 1
    assert console.tail() == ("[0.0] Linux version 7.3.4 (x)", "unfinished")


def test_control_characters_do_not_reach_the_reader() -> None:
    _, console = feed_console(b"\x1b[2J\x1bc\x07plain\r\n\x1b[31m\xc2\x9bred")
    assert "plain" in console.text
    assert console.tail()[-1] == "red"
    assert "\x1b[" not in console.text
    assert "\x07" not in console.text
