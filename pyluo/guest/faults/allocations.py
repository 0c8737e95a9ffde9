"""Allocations of the kernel that fail on purpose.

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
    """One allocation fails, of those that this thread makes in the `with` block.

    Those that may wait for memory can fail too, which are most of them.

    Args:
        number: which one, from 1.

    Attributes:
        thrown: whether there were as many, once the block is left.

    Raises:
        FaultMissingError: on entry.

    Source: /proc/PID/task/TID/fail-nth. Linux 4.14.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.thrown = False
        self._fd = -1

    def __enter__(self) -> Self:
        _let_those_fail_that_may_wait()
        self._fd = _open_of_thread("fail-nth")
        os.pwrite(self._fd, str(self.number).encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.thrown = os.pread(self._fd, 20, 0).strip() == b"0"
        os.pwrite(self._fd, b"0", 0)
        os.close(self._fd)
        self._fd = -1


def each_fails() -> Iterator[NthFails]:
    """Faults for so many tries of one thing: its first allocation fails, its second, and so on.

    They end with the try in which no allocation was left to fail:

        for fault in each_fails():
            with fault:
                ...
    """
    for number in count(1):
        fault = NthFails(number)
        yield fault
        if not fault.thrown:
            return


@contextmanager
def failslab(probability: int = 100, *, times: int = -1) -> Iterator[None]:
    """Allocations of the kernel's slabs fail by chance, those that this thread makes in the block.

    Args:
        probability: of each, in percent.
        times: how many fail at most; -1 for no limit.

    Raises:
        FaultMissingError: on entry.
    """
    folder = f"{_DEBUGFS}/failslab"
    _let_those_fail_that_may_wait()
    fault = _open_of_thread("make-it-fail")
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


def _let_those_fail_that_may_wait() -> None:
    for name, option in _CAPABILITIES.items():
        path = f"{_DEBUGFS}/{name}/ignore-gfp-wait"
        if not os.path.exists(path):
            raise FaultMissingError(name, option)
        _write(path, "N")
        # A trace of each in the log takes the console longer than all else.
        _write(f"{_DEBUGFS}/{name}/verbose", "0")


def _open_of_thread(name: str) -> int:
    return os.open(f"/proc/self/task/{threading.get_native_id()}/{name}", os.O_RDWR | os.O_CLOEXEC)


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)
