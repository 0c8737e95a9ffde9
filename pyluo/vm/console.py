"""What the guest's kernel says on its serial line, and the words that mean its death."""

from __future__ import annotations

import asyncio
import codecs
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.vm.errors import Death

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Console"]

_TAIL = 60
_TRACE_TIMEOUT = 2.0  # seconds for a dying kernel to finish its trace
_STAMP = r"\[ *\d+\.\d+\](?:\[[^]]*\])? "  # the kernel's; a program's own words are no death
_DEATHS = (
    (re.compile(_STAMP + r"Kernel panic - not syncing: (.*)"), Death.PANIC),
    (
        re.compile(
            _STAMP + r"((?:Oops: |BUG: unable to handle|BUG: kernel NULL|kernel BUG at "
            r"|general protection fault|double fault|divide error).*)"
        ),
        Death.OOPS,
    ),
)
_LAST_WORDS = "---[ end Kernel panic"
_BEGINNING = re.compile(_STAMP + r"Linux version ")
_OMEN = re.compile(
    _STAMP + r"(?:watchdog: |rcu: |INFO: )*(BUG: soft lockup.*|.*hard LOCKUP.*|.*detected stalls.*"
    r"|.*self-detected stall.*|task .* blocked for more than.*)"
)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """Reads the serial line as it comes.

    Args:
        on_beginning: called with the time when a kernel says its first line.
        on_death: called with what it was and the kernel's words, once its trace is complete.

    Attributes:
        omen: the last lockup, stall or hung task that the kernel complained of; it may recover.
    """

    def __init__(
        self, on_beginning: Callable[[float], None], on_death: Callable[[Death, str], None]
    ) -> None:
        self._on_beginning = on_beginning
        self._on_death = on_death
        self._lines: list[str] = []
        self._partial = ""
        self._dying: tuple[Death, str] | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.omen = ""

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Takes lines until QEMU closes the line."""
        with suppress(ConnectionResetError):  # QEMU's death, which is an end as well
            while data := await stream.read(1 << 16):
                *lines, self._partial = (self._partial + self._decode(data)).split("\n")
                now = time.monotonic()
                for line in lines:
                    self._take(_plain(line), now)
        if self._partial:
            self._take(_plain(self._partial), time.monotonic())
            self._partial = ""
        if self._dying:
            self._on_death(*self._dying)

    def tail(self) -> tuple[str, ...]:
        """The last lines, the unfinished one too."""
        rest = [_plain(self._partial)] if self._partial else []
        return tuple((self._lines + rest)[-_TAIL:])

    @property
    def text(self) -> str:
        """Everything so far."""
        return "\n".join([*self._lines, _plain(self._partial)])

    def _take(self, line: str, now: float) -> None:
        self._lines.append(line)
        if omen := _OMEN.search(line):
            self.omen = omen[1]
        if _BEGINNING.search(line):
            self.omen = ""  # that was another life's
            self._on_beginning(now)
        if self._dying:
            if _LAST_WORDS in line:
                self._on_death(*self._dying)
            return
        for pattern, death in _DEATHS:
            if match := pattern.search(line):
                self._dying = (death, match[1].strip())
                asyncio.get_running_loop().call_later(_TRACE_TIMEOUT, self._on_death, *self._dying)
                return


def _plain(line: str) -> str:
    return _CONTROL.sub("", line)
