"""The configuration that a kernel was built with: the lines of its .config."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

__all__ = ["BuildConfig"]

_RUNNING = ("/proc/config.gz", "/boot/config-{release}", "/lib/modules/{release}/config")


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """The configuration that a kernel was built with.

    Attributes:
        text: the content of its .config file.
    """

    text: str

    @classmethod
    def running(cls) -> Self | None:
        """Return the configuration of the running kernel; None if it cannot be read.

        Source: /proc/config.gz, /boot/config-RELEASE or /lib/modules/RELEASE/config
        """
        release = os.uname().release
        for pattern in _RUNNING:
            try:
                with open(pattern.format(release=release), "rb") as file:
                    data = file.read()
            except OSError:
                continue
            if pattern.endswith(".gz"):
                import gzip  # here, because it takes a moment to load

                data = gzip.decompress(data)
            return cls(data.decode(errors="surrogateescape"))
        return None

    def has(self, option: str) -> bool:
        """Return whether an option is built in.

        Args:
            option: the name of the option, with CONFIG_.
        """
        return f"\n{option}=y\n" in f"\n{self.text}\n"

    @property
    def command_line(self) -> str:
        """The part of the command line that is built in; empty if there is none.

        Source: CONFIG_CMDLINE
        """
        if not self.has("CONFIG_CMDLINE_BOOL"):
            return ""
        start = 'CONFIG_CMDLINE="'
        for line in self.text.splitlines():
            if line.startswith(start) and line.endswith('"'):
                return line[len(start) : -1].replace('\\"', '"').replace("\\\\", "\\")
        return ""
