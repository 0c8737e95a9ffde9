"""Make the trace in a kernel's report readable: only the calls, with their source lines."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels.symbols import Symbols
from pyluo.vm.machine.report import STAMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["trace"]

_STAMP = re.compile(f"^.*?{STAMP}")
_FRAME = re.compile(r"(?P<rip>RIP: \w+:)?(?P<symbol>[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+)")
_GUESS = re.compile(r"^\s*\? ")  # an address on the stack that may be left over from earlier calls
# The lines before the traces in a report that say of which CPU or task each trace is.
_HEADING = re.compile(
    r"^\s*(?:CPU: \d+ |NMI backtrace for|task:|Sending NMI|sysrq: Show |(?:Allocated|Freed) by task"
    r"|stack backtrace|the existing dependency|-> #\d|.* is trying to (?:acquire|release) lock"
    r"|BUG: |WARNING: |Kernel panic|INFO: |rcu: |watchdog: )"
)


def trace(lines: Sequence[str], kernel: Kernel) -> tuple[str, ...]:
    """Return the lines of a report that show calls, and the headings of its traces.

    The file and line in the source are added to each call if vmlinux has debug information, and
    can still be read.

    Args:
        lines: the lines of the report, as the kernel printed them.
        kernel: the kernel that printed the report.
    """
    texts = [_STAMP.sub("", line).rstrip() for line in lines]
    frames = {
        number: match
        for number, text in enumerate(texts)
        if not _GUESS.match(text) and (match := _FRAME.search(text))
    }
    calls = [(match["symbol"], match["rip"] is None) for match in frames.values()]
    places: dict[tuple[str, bool], str] = {}
    # What the kernel said counts, even if the tree that it was built from is gone or half rebuilt.
    with suppress(OSError, ValueError, LookupError, HarnessError, subprocess.SubprocessError):
        places = Symbols(kernel).find_lines(calls)
    readable = []
    for number, text in enumerate(texts):
        if match := frames.get(number):
            place = places.get((match["symbol"], match["rip"] is None))
            readable.append(f"{text} ({place})" if place else text)
        elif _HEADING.match(text):
            readable.append(text)
    return tuple(readable)
