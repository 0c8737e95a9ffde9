"""What the running kernel reports about live update: whether it works, and what was handed over."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.build_config import BuildConfig
from pyluo.cmdline import is_switched_on, split
from pyluo.kernel_log import KernelLog
from pyluo.liveupdate import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KhoStatus", "Obstacle", "status"]

_FIRST_RELEASE = (6, 19)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason why this system has no live update.

    Attributes:
        missing: the problem, in words.
        remedy: how to solve it, in words.
    """

    missing: str
    remedy: str


@dataclass(frozen=True, slots=True)
class KhoStatus:
    """The live update state of the running kernel.

    An attribute that is read from the kernel's log is None if the log has no message about it, and
    cannot be read or no longer has its first messages.

    Attributes:
        release: the release of the running kernel, as `uname -r` prints it.
        live_update: whether /dev/liveupdate exists.
        handed_over: whether the previous kernel handed data over to this one; from the log.
        from_release: the release of the previous kernel; from the log.
        kexecs: the number of kexecs with handover since the cold boot; from the log.
        updates: the number of live updates since the cold boot; from the log.
        obstacles: the reasons why this system has no live update; empty if it has live update.
    """

    release: str
    live_update: bool
    handed_over: bool | None
    from_release: str | None
    kexecs: int | None
    updates: int | None
    obstacles: tuple[Obstacle, ...]


_UNEXPLAINED = Obstacle(
    f"{DEVICE} does not exist, for no known reason",
    "see the lines of `luo:` and `KHO:` in dmesg; in a container, look on its host",
)


def status() -> KhoStatus:
    """Return the live update state of the running kernel.

    Source: /dev/kmsg, /proc/cmdline, /proc/config.gz or /boot/config-RELEASE. Linux 6.19.
    """
    release = os.uname().release
    log = KernelLog()
    live_update = os.path.exists(DEVICE)
    return KhoStatus(
        release=release,
        live_update=live_update,
        handed_over=log.handed_over,
        from_release=log.from_release,
        kexecs=log.kexecs,
        updates=log.updates,
        obstacles=() if live_update else tuple(_find_obstacles(release, log)) or (_UNEXPLAINED,),
    )


def _find_obstacles(release: str, log: KernelLog) -> Iterator[Obstacle]:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < _FIRST_RELEASE:
        yield Obstacle(
            f"the running kernel is {release}, and live update came with Linux 6.19",
            "boot a newer kernel built with CONFIG_LIVEUPDATE=y",
        )
        return
    config = BuildConfig.running()
    wanted = ("CONFIG_KEXEC_FILE", "CONFIG_KEXEC_HANDOVER", "CONFIG_LIVEUPDATE")
    absent = [option for option in wanted if config is not None and not config.has(option)]
    if absent:
        yield Obstacle(
            f"the kernel {release} was built without {', '.join(absent)}",
            "no distribution's kernel enables them yet: build a kernel with them, or try live "
            "updates in a guest with `pyluo demo`",
        )
        return
    if config is None:
        yield Obstacle(
            f"the configuration of the kernel {release} cannot be read",
            "make sure that it has CONFIG_KEXEC_HANDOVER=y and CONFIG_LIVEUPDATE=y",
        )
    try:
        cmdline = Path("/proc/cmdline").read_text(errors="surrogateescape")
    except OSError:
        cmdline = ""
    if not is_switched_on("liveupdate", cmdline, default=False):
        yield Obstacle(
            "the kernel command line lacks liveupdate=on",
            "boot again with `kho=on liveupdate=on` on it, and without liveupdate=off",
        )
    by_default = config is not None and config.has("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    if not is_switched_on("kho", cmdline, default=by_default):
        off = by_default or any(word.startswith("kho=") for word in split(cmdline))
        yield Obstacle(
            "the kernel command line has kho=off"
            if off
            else "the kernel command line lacks kho=on",
            "boot again with `kho=on liveupdate=on` on it",
        )
    if log.lacks_scratch:
        yield Obstacle(
            "the kernel found no room in memory for the scratch areas that the next one boots in",
            "boot again with smaller scratch areas, kho_scratch=75% on the command line (default: "
            "200%), or with more memory",
        )
