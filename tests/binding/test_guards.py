"""Tests of pyluo's own checks, as far as they need no kernel with LUO."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from pyluo import PreservedMemoryError, guards

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[float]]:
    """Set the room in the memory cgroup; the result gets an item for each look at it."""
    looks: list[float] = []
    monkeypatch.setattr(guards, "_room_lately", guards._Allowance())
    monkeypatch.setattr(guards, "_ALLOWANCE_PERIOD", 60.0)

    def set_room(room: float) -> list[float]:
        def look() -> tuple[float, str]:
            looks.append(room)
            return room, "/small"

        monkeypatch.setattr(guards, "room_in_cgroups", look)
        return looks

    return set_room


def test_a_cgroup_without_a_limit_is_looked_at_once_in_a_while(
    limit: Callable[[float], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = limit(math.inf)
    for size in (None, 1 << 60, None):
        guards.refuse_full_cgroup(size, "a file")
    assert len(looks) == 1
    monkeypatch.setattr("pyluo.guards.time.monotonic", lambda: math.inf)
    guards.refuse_full_cgroup(None, "a file")
    assert len(looks) == 2


def test_files_of_known_sizes_take_from_the_room_that_a_look_has_found(
    limit: Callable[[float], list[float]],
) -> None:
    looks = limit(10 * MIB)
    for _ in range(3):
        guards.refuse_full_cgroup(2 * MIB, "a file")  # the first leaves eight for the others
    assert len(looks) == 1
    for _ in range(3):
        guards.refuse_full_cgroup(4 * MIB, "a file")  # only the first one is within the eight
    assert len(looks) == 2
    with pytest.raises(PreservedMemoryError, match="the memory cgroup /small has room for 10 MiB"):
        guards.refuse_full_cgroup(11 * MIB, "a file")


def test_where_there_is_a_limit_each_file_of_unknown_size_needs_a_look(
    limit: Callable[[float], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"MemTotal": 5 * MIB, "MemFree": 0}
    monkeypatch.setattr(guards, "_read_meminfo", lambda: memory)
    looks = limit(100 * MIB)
    for count in (1, 2):
        guards.refuse_full_cgroup(None, "a file")
        assert len(looks) == count
    memory["MemTotal"] = 101 * MIB
    with pytest.raises(PreservedMemoryError, match="say how large it is"):
        guards.refuse_full_cgroup(None, "a file")
