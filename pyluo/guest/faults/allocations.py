"""Kernel allocations that fail on purpose.

Source: Documentation/fault-injection/fault-injection.rst
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Self

from pyluo.guest.faults.missing import FaultMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["NthFails", "each_fails", "failslab"]

_DEBUGFS = "/sys/kernel/debug"
_CAPABILITIES = {"failslab": "CONFIG_FAILSLAB", "fail_page_alloc": "CONFIG_FAIL_PAGE_ALLOC"}


class NthFails:
    """A `with` block in which one allocation that the kernel makes for this thread fails.

    Allocations that may wait for memory, as most allocations may, are counted and can fail, too.

    Args:
        number: which of the allocations in the block fails; 1 is the first.

    Attributes:
        injected: whether an allocation failed, because the block made that many; valid after the
            block.

    Raises:
        FaultMissingError: the kernel cannot inject this fault; raised on entry.

    Source: /proc/PID/task/TID/fail-nth, since Linux 4.14.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.injected: bool = False
        self._fd = -1

    def __enter__(self) -> Self:
        _include_waiting_allocations()
        self._fd = _open_thread_file("fail-nth")
        os.pwrite(self._fd, str(self.number).encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.injected = os.pread(self._fd, 20, 0).strip() == b"0"
        os.pwrite(self._fd, b"0", 0)
        os.close(self._fd)
        self._fd = -1


def each_fails() -> Iterator[NthFails]:
    """Yield a fault for the first allocation of some work, then for its second, and so on.

    The caller repeats the work in a block of each fault. The iterator ends after the work has run
    without a failure, because it has made fewer allocations than the fault's number:

        for fault in each_fails():
            with fault:
                ...
    """
    for number in count(1):
        fault = NthFails(number)
        yield fault
        if not fault.injected:
            return


@contextmanager
def failslab(probability: int = 100, *, times: int = -1) -> Iterator[None]:
    """Make slab allocations that the kernel makes for this thread in the block fail at random.

    Args:
        probability: how likely each allocation is to fail, in percent.
        times: how many allocations fail at most; -1 for no limit.

    Raises:
        FaultMissingError: the kernel cannot inject this fault; raised on entry.
    """
    folder = f"{_DEBUGFS}/failslab"
    _include_waiting_allocations()
    fault = _open_thread_file("make-it-fail")
    settings = {
        "verbose": "0", "task-filter": "Y", "times": str(times), "probability": str(probability)
    }  # fmt: skip
    try:
        for name, value in settings.items():
            _write(f"{folder}/{name}", value)
        os.pwrite(fault, b"1", 0)
        yield
    finally:
        os.pwrite(fault, b"0", 0)
        os.close(fault)
        _write(f"{folder}/probability", "0")


def _include_waiting_allocations() -> None:
    for name, option in _CAPABILITIES.items():
        path = f"{_DEBUGFS}/{name}/ignore-gfp-wait"
        if not os.path.exists(path):
            raise FaultMissingError(name, option)
        _write(path, "N")
        # If the kernel logged a trace of each failure, logging would take longer than all the rest.
        _write(f"{_DEBUGFS}/{name}/verbose", "0")


def _open_thread_file(name: str) -> int:
    return os.open(f"/proc/self/task/{threading.get_native_id()}/{name}", os.O_RDWR | os.O_CLOEXEC)


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)
