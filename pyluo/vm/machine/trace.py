"""A kernel's trace, made readable: the calls, and their lines in the source."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pyluo.vm.kernels.symbols import Symbols
from pyluo.vm.machine.report import STAMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["trace"]

_STAMP = re.compile(f"^.*?{STAMP}")
_FRAME = re.compile(r"(?P<rip>RIP: \w+:)?(?P<symbol>[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+)")
_GUESS = re.compile(r"^\s*\? ")  # an address on the stack that may be left over from earlier calls
# Lines that tell whose trace follows, since a report may have several.
_HEADING = re.compile(
    r"^\s*(?:CPU: \d+ |NMI backtrace for|task:|Sending NMI|sysrq: Show |(?:Allocated|Freed) by task"
    r"|stack backtrace|the existing dependency|-> #\d|.* is trying to (?:acquire|release) lock"
    r"|BUG: |WARNING: |Kernel panic|INFO: |rcu: |watchdog: )"
)


def trace(lines: Sequence[str], kernel: Kernel) -> tuple[str, ...]:
    """Return the calls in a report, each with its line of the source if vmlinux tells it.

    Args:
        lines: the lines of the report, as they came over the serial line.
        kernel: the kernel that printed them.
    """
    symbols = Symbols(kernel)
    texts = [_STAMP.sub("", line).rstrip() for line in lines]
    frames = {
        number: match
        for number, text in enumerate(texts)
        if not _GUESS.match(text) and (match := _FRAME.search(text))
    }
    calls = [(match["symbol"], match["rip"] is None) for match in frames.values()]
    places = symbols.find_lines(calls)
    readable = []
    for number, text in enumerate(texts):
        if match := frames.get(number):
            place = places.get((match["symbol"], match["rip"] is None))
            readable.append(f"{text} ({place})" if place else text)
        elif _HEADING.match(text):
            readable.append(text)
    return tuple(readable)
