"""Tests of pyluo's own checks, as far as they need no kernel with LUO."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyluo import PreservedMemoryError, guards

MIB = 1 << 20


def test_a_limit_that_was_set_just_now_counts_for_the_next_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"/proc/self/cgroup": "0::/small", "memory.max": "max", "memory.current": "0"}
    monkeypatch.setattr(guards, "_read", lambda path: files.get(path) or files[Path(path).name])
    monkeypatch.setattr(guards, "_reclaimable", lambda path: 0)
    monkeypatch.setattr(guards, "_read_meminfo", lambda: {"MemTotal": 9 * MIB, "MemFree": MIB})
    for size in (None, 1 << 60):
        guards.refuse_full_cgroup(size, "a file")
    files["memory.max"] = str(7 * MIB)
    guards.refuse_full_cgroup(7 * MIB, "a file")
    with pytest.raises(PreservedMemoryError, match="the memory cgroup /small has room for 7 MiB"):
        guards.refuse_full_cgroup(8 * MIB, "a file")
    with pytest.raises(PreservedMemoryError, match=r"possibly 8 MiB.*say how large it is"):
        guards.refuse_full_cgroup(None, "a file")
    guards.refuse_full_cgroup(0, "a file that was retrieved before")


def test_where_no_cgroup_has_a_limit_the_memory_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []

    def read(path: str) -> str:
        looks.append(path)
        return "1:name=systemd:/x\n0::/a/b\n" if path == "/proc/self/cgroup" else "max\n"

    monkeypatch.setattr(guards, "_read", read)
    monkeypatch.setattr(guards, "_read_meminfo", lambda: pytest.fail("it was looked at"))
    guards.refuse_full_cgroup(None, "a file")
    limits = [f"/sys/fs/cgroup{group}/memory.max" for group in ("/a/b", "/a", "/")]
    assert looks == ["/proc/self/cgroup", *limits]
