"""Ways for a guest to die, and the failure that the harness must report for each.

PYLUO_ROUNDS is how often each is tried, by default once. If it is set, the time until a death is
reported is limited too.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from deaths import guest_deaths
from pyluo.vm import VM, GuestCrash, GuestFailure, KernelComplaint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyluo.vm.errors import Cause

ROUNDS = int(os.environ.get("PYLUO_ROUNDS", "1"))
TIMED = "PYLUO_ROUNDS" in os.environ  # otherwise other guests may slow it down
PROMPT = 5.0  # seconds from the kernel's first line about the death to the failure
SPARE = 10.0  # seconds beyond the limit, to find out where a silent guest's CPUs are


@dataclass(frozen=True)
class Provocation:
    """A way to die.

    Attributes:
        cause: the cause that the failure must have.
        provoke: the function that provokes it.
        reason: a part of the failure's reason.
        trace: a function that must be in the trace; empty if there is no trace.
        source: the source file that the trace must name for that function, if the kernel has
            debug information.
        cpus: how many CPUs the trace must show in that function.
        prints: whether the kernel prints something about the death.
        options: the options of the guest.
        life: the number of the life in which it happens.
    """

    cause: Cause
    provoke: Callable[[VM], object]
    reason: str
    trace: str = ""
    source: str = ""
    cpus: int = 1
    prints: bool = True
    options: Any = None
    life: int = 1

    def check(self, kernel: str) -> None:
        """Provoke the death in a guest, and check the failure that the harness raises.

        Args:
            kernel: the name of the guest's kernel.
        """
        with VM(kernel, **self.options or {}) as vm:
            begun = time.monotonic()
            with pytest.raises(GuestFailure) as caught:
                _provoke_and_check(vm, self)
            ended = time.monotonic()
            assert type(caught.value) is (GuestCrash if vm.dead else KernelComplaint)
            reports, limit = vm.reports, max(vm.silence, 30.0)
        crash = caught.value
        assert crash.cause is self.cause, str(crash)
        assert self.reason in crash.reason
        assert (crash.kernel, crash.life) == (kernel, self.life)
        assert crash.console
        calls = [(cpu, line) for cpu, line in _by_cpu(crash.trace) if self.trace in line]
        assert len({cpu for cpu, _ in calls}) >= (self.cpus if self.trace else 0), str(crash)
        assert not self.source or any(f"{self.source}:" in line for _, line in calls), str(crash)
        if self.prints:
            first = next(each for each in reports if each.complaint is self.cause)
            assert ended - first.at < PROMPT or not TIMED
        elif TIMED:
            assert ended - begun < limit + SPARE


def _by_cpu(trace: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each line with the number of the CPU that it is about; empty if that is not known."""
    cpu = ""
    for line in trace:
        if match := re.match(r"CPU: (\d+) ", line):
            cpu = match[1]
        yield cpu, line


def _provoke_and_check(vm: VM, case: Provocation) -> None:
    case.provoke(vm)
    vm.check()


def lkdtm(point: str) -> Callable[[VM], object]:
    """Return a function that triggers a crash point of the kernel's module lkdtm."""
    return lambda vm: vm.call(guest_deaths.provoke, point)


def make_endless_loop(image: bytes) -> bytes:
    """Return a bzImage that loops in its first instruction forever."""
    setup = (image[0x1F1] + 1) * 512  # Documentation/arch/x86/boot.rst, setup_sects
    jump_to_itself = bytes([0xEB, 0xFE])
    return image[:setup] + jump_to_itself * ((len(image) - setup) // 2)
