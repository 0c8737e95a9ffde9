"""Tests of how many guests run at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import cores
from pyluo.vm.cores import usable_cores
from pyluo.vm.machine.capacity import at_once

if TYPE_CHECKING:
    from pathlib import Path

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


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for /sys/fs/cgroup, and the file beside it for /proc/self/cgroup."""
    folder = tmp_path / "cgroups"
    folder.mkdir()
    monkeypatch.setattr(cores, "_CGROUPS", folder)
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return folder


@pytest.mark.parametrize(
    ("membership", "limits", "number"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),  # docker run --cpus=2, with a namespace
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/host/path", {"cpu.max": "400000 100000"}, 4),  # without a namespace
        ("3:cpu,cpuacct:/d", {"cpu,cpuacct/d/cpu.cfs_{}_us": "200000 100000"}, 2),
        ("3:cpu,cpuacct:/d", {"cpu,cpuacct/cpu.cfs_{}_us": "500000 100000"}, 5),
        ("3:cpu,cpuacct:/d\n1:memory:/", {"cpu,cpuacct/d/cpu.cfs_{}_us": "-1 100000"}, 64),
        ("", {}, 64),
    ],
)
def test_a_quota_of_cpu_time_counts_as_cores(
    cgroups: Path, membership: str, limits: dict[str, str], number: int
) -> None:
    cgroups.with_name("membership").write_text(membership and f"{membership}\n")
    for name, value in limits.items():
        values = {name: value}
        if "{}" in name:
            values = dict(zip(map(name.format, ("quota", "period")), value.split(), strict=True))
        for path, text in values.items():
            (cgroups / path).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / path).write_text(f"{text}\n")
    assert usable_cores() == number


GUESTS = "[pytest]\npyluo_guests = true\n"


def test_auto_is_that_number_of_workers(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): pass")
    pytester.makeini(GUESTS)
    number = at_once(GIB)
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=1G")
    outcome.stdout.fnmatch_lines([f"*{number} worker*"])


def test_who_asks_for_another_number_of_workers_has_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("def test_one(): pass")
    pytester.makeini(GUESTS)
    number = (os.cpu_count() or 1) + 1
    pytester.makeconftest(f"def pytest_xdist_auto_num_workers(config): return {number}")
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=1M")
    outcome.stdout.fnmatch_lines([f"*{number} workers*"])
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=9999G")
    outcome.stdout.fnmatch_lines(["*1 worker *"])
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    outcome = pytester.runpytest_subprocess("-n", "auto", "--pyluo-memory=9999G")
    outcome.stdout.fnmatch_lines(["*3 workers*"])
