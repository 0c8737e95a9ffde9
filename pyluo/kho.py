"""What this kernel can hand over, and what it was handed: read, never changed."""

from __future__ import annotations

import errno
import gzip
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyluo.liveupdate import DEVICE

__all__ = ["KhoStatus", "Obstacle", "messages", "status"]

_CONFIGS = ("/proc/config.gz", "/boot/config-{release}", "/lib/modules/{release}/config")
_FIRST_RELEASE = (6, 19)
_RECORD_LIMIT = 8192
_UPDATES = re.compile(r"luo: Retrieved live update data, liveupdate number: (\d+)")
_EXEC_FROM = re.compile(r"KHO: exec from: (\S+) \(count (\d+)\)")
_FOUND = "KHO: found kexec handover data."


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that stands between this system and a live update.

    Attributes:
        missing: what it is.
        remedy: how to get it.
    """

    missing: str
    remedy: str


@dataclass(frozen=True, slots=True)
class KhoStatus:
    """The live update state of the running kernel.

    What is read from the kernel's log is None when the log cannot be read, or has lost its
    beginning and does not say.

    Attributes:
        release: of the running kernel, as `uname -r` gives it.
        live_update: whether /dev/liveupdate is there.
        handed_over: whether this kernel was given data by the one before it.
        from_release: the release of the kernel before it.
        kexecs: how many kexecs with handover there were since the cold boot.
        updates: how many live updates there were since the cold boot.
        obstacles: why there is no live update; empty when there is.
    """

    release: str
    live_update: bool
    handed_over: bool | None
    from_release: str | None
    kexecs: int | None
    updates: int | None
    obstacles: tuple[Obstacle, ...]


def status() -> KhoStatus:
    """Reads the kernel's log, its command line and its configuration.

    Source: kernel/liveupdate/kexec_handover.c and luo_core.c, their messages. Linux 6.19; the
    release and the number of kexecs since 7.0.
    """
    release = os.uname().release
    log = _KernelLog.read()
    found = log.says(_FOUND)
    updates = log.search(_UPDATES)
    origin = log.search(_EXEC_FROM)
    nothing = 0 if found is False else None
    live_update = DEVICE.exists()
    return KhoStatus(
        release=release,
        live_update=live_update,
        handed_over=found,
        from_release=origin[1] if origin else None,
        kexecs=int(origin[2]) if origin else nothing,
        updates=int(updates[1]) if updates else nothing,
        obstacles=() if live_update else tuple(_obstacles(release)),
    )


def messages() -> list[str]:
    """The kernel's messages of this boot, as far as its log still has them.

    Returns:
        One string a message; none where the log may not be read.
    """
    return _KernelLog.read().messages


@dataclass(frozen=True, slots=True)
class _KernelLog:
    """The kernel's messages of this boot, and whether the first is still among them."""

    messages: list[str]
    whole: bool

    @classmethod
    def read(cls) -> _KernelLog:
        messages = []
        first = None
        for record in _records():
            header, _, message = record.partition(";")
            if first is None:
                first = int(header.split(",")[1])
            messages.append(message.split("\n", 1)[0])
        return cls(messages, whole=first == 0)

    def says(self, text: str) -> bool | None:
        if any(text in message for message in self.messages):
            return True
        return False if self.whole else None

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return next(filter(None, map(pattern.search, self.messages)), None)


def _records() -> Iterator[str]:
    """The records of /dev/kmsg, oldest first; none where reading it is not allowed."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        while True:
            try:
                yield os.read(fd, _RECORD_LIMIT).decode(errors="replace")
            except BlockingIOError:
                return
            except OSError as error:
                # EPIPE: the ring moved on past the record to be read; the next read goes on.
                if error.errno != errno.EPIPE:
                    return
    finally:
        os.close(fd)


def _obstacles(release: str) -> Iterator[Obstacle]:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < _FIRST_RELEASE:
        yield Obstacle(
            f"the running kernel is {release}, and live update came with Linux 6.19",
            "boot a newer kernel built with CONFIG_LIVEUPDATE=y",
        )
        return
    config = _config(release)
    wanted = ("CONFIG_KEXEC_FILE", "CONFIG_KEXEC_HANDOVER", "CONFIG_LIVEUPDATE")
    absent = [option for option in wanted if f"\n{option}=y\n" not in config]
    if config and absent:
        yield Obstacle(
            f"the kernel {release} was built without {', '.join(absent)}",
            "no distribution's kernel has them on yet: build one that has, or try live updates "
            "in a guest with `pyluo demo`",
        )
        return
    try:
        cmdline = Path("/proc/cmdline").read_text().split()
    except OSError:
        cmdline = []
    if not any(re.fullmatch(r"liveupdate=(1|on|y|yes|true)", word) for word in cmdline):
        yield Obstacle(
            "the kernel command line lacks liveupdate=on",
            "add `kho=on liveupdate=on` to it and boot again",
        )
    if any(re.fullmatch(r"kho=(0|off|n|no|false)", word) for word in cmdline):
        yield Obstacle("the kernel command line has kho=off", "remove it and boot again")
    elif "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y" not in config and "kho=on" not in cmdline:
        yield Obstacle("the kernel command line lacks kho=on", "add it and boot again")


def _config(release: str) -> str:
    """The configuration of the running kernel, or nothing where it was not published."""
    for pattern in _CONFIGS:
        path = Path(pattern.format(release=release))
        try:
            data = path.read_bytes()
        except OSError:
            continue
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        return "\n" + text.decode(errors="replace")
    return ""
