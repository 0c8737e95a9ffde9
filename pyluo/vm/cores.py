"""The number of cores that this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["usable_cores"]

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by quotas of its cgroups.

    A quota is a share of the time of all cores, such as that of `docker run --cpus=2`; a part of a
    core counts as one.

    Source: Documentation/admin-guide/cgroup-v2.rst, cpu.max; Documentation/scheduler/sched-bwc.rst
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """Return the quotas of this process's cgroups and their ancestors, in cores."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v1 = "cpu" in controllers.split(",")
        if not v1 and controllers:
            continue
        top = _CGROUPS / controllers
        # In a container, the path may be the one that the host sees, and the container's own cgroup
        # is at the top.
        own = top / path.lstrip("/")
        folders = [own, *(each for each in own.parents if each.is_relative_to(top)), top]
        for folder in dict.fromkeys(folders):
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                quotas.append(_read_v1(folder) if v1 else _read_v2(folder))
    return [quota for quota in quotas if quota > 0]


def _read_v2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _read_v1(folder: Path) -> float:
    quota, period = (
        int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
    )
    return quota / period  # the quota is -1 if there is no limit
