"""A way for a guest to die, and how it is to be told: for the catalogues of deaths.

PYLUO_ROUNDS, 1 if it is not set, says how often each is tried; if it is set, how long it takes
until a death is told has limits too.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from deaths import guest_deaths
from pyluo.vm import VM, Death, GuestCrash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROUNDS = int(os.environ.get("PYLUO_ROUNDS", "1"))
TIMED = "PYLUO_ROUNDS" in os.environ  # else other guests may run beside, and time says nothing
PROMPT = 5.0  # seconds from the kernel's first word of it
SPARE = 10.0  # seconds to find out where a silent guest is, over the limit


@dataclass(frozen=True)
class Provocation:
    """A way to die.

    Attributes:
        death: what it is to be told as.
        provoke: does it.
        reason: part of the reason.
        trace: a function that the trace is to name, if there is a trace.
        source: the file that the trace is to have for it, if the kernel has debug information.
        cpus: how many of them the trace has to show in that function.
        prints: whether the kernel says something of its own accord.
        options: of the guest.
        life: it happens in.
    """

    death: Death
    provoke: Callable[[VM], object]
    reason: str
    trace: str = ""
    source: str = ""
    cpus: int = 1
    prints: bool = True
    options: Any = None
    life: int = 1

    def told(self, kernel: str) -> None:
        """Has a guest die of it, and looks at what is told.

        Args:
            kernel: that it runs.
        """
        with VM(kernel, **self.options or {}) as vm:
            begun = time.monotonic()
            with pytest.raises(GuestCrash) as caught:
                _provoke_and_look(vm, self)
            ended = time.monotonic()
            reports, limit = vm.reports, max(vm.silence, 30.0)
        crash = caught.value
        assert crash.death is self.death, str(crash)
        assert self.reason in crash.reason
        assert (crash.kernel, crash.life) == (kernel, self.life)
        assert crash.console
        calls = [(cpu, line) for cpu, line in _by_cpu(crash.trace) if self.trace in line]
        assert len({cpu for cpu, _ in calls}) >= (self.cpus if self.trace else 0), str(crash)
        assert not self.source or any(f"{self.source}:" in line for _, line in calls), str(crash)
        if self.prints:
            first = next(each for each in reports if each.death is self.death)
            assert ended - first.at < PROMPT or not TIMED
        elif TIMED:
            assert ended - begun < limit + SPARE


def _by_cpu(trace: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each line, with the processor that it is about as far as that was said; empty before."""
    cpu = ""
    for line in trace:
        if said := re.match(r"CPU: (\d+) ", line):
            cpu = said[1]
        yield cpu, line


def _provoke_and_look(vm: VM, case: Provocation) -> None:
    case.provoke(vm)
    vm.check()


def lkdtm(point: str) -> Callable[[VM], object]:
    """Has the kernel's own test module do it."""
    return lambda vm: vm.call(guest_deaths.provoke, point)


def on(**options: object) -> dict[str, object]:
    """A guest's options."""
    return options


def going_round(image: bytes) -> bytes:
    """A bzImage that does nothing but go round in its first instruction."""
    setup = (image[0x1F1] + 1) * 512  # Documentation/arch/x86/boot.rst, setup_sects
    jump_to_itself = bytes([0xEB, 0xFE])
    return image[:setup] + jump_to_itself * ((len(image) - setup) // 2)
