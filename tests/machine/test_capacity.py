"""Tests of how many guests run at once."""

from __future__ import annotations

import os

import pytest

from pyluo.vm.machine.capacity import at_once

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cores", "memory", "guest", "cpus", "number"),
    [
        (8, 64 * GIB, GIB, 1, 8),  # limited by the cores
        (8, 64 * GIB, GIB, 4, 2),
        (8, 6 * GIB, GIB, 1, 4),  # by the memory; each guest takes half a GiB more than its own
        (8, 6 * GIB, 2 * GIB, 1, 2),
        (2, 64 * GIB, GIB, 4, 1),  # one guest always runs
        (2, GIB, 4 * GIB, 1, 1),
    ],
)
def test_as_many_guests_as_cores_and_memory_allow(
    cores: int, memory: int, guest: int, cpus: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert at_once(guest, cpus) == number


def test_a_cgroup_has_no_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    room = "pyluo.vm.machine.capacity.room_in_cgroups"
    monkeypatch.setattr(room, lambda: (4 * GIB, "/container"))
    assert at_once(GIB) == 2


def test_auto_is_that_number_of_workers(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): pass")
    number = at_once(GIB)
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=1G")
    outcome.stdout.fnmatch_lines([f"*{number} worker*"])


def test_who_asks_for_another_number_of_workers_has_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("def test_one(): pass")
    pytester.makeconftest("def pytest_xdist_auto_num_workers(config): return 3")
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=1M")
    outcome.stdout.fnmatch_lines(["*3 workers*"])
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=9999G")
    outcome.stdout.fnmatch_lines(["*1 worker *"])
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=9999G")
    outcome.stdout.fnmatch_lines(["*3 workers*"])
