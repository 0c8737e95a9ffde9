"""Allocations that fail on purpose, in a guest of the kernel `selftest`."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


def allow() -> None:
    """Lets those fail that may wait for memory, which is most of them."""
    for name in ("failslab", "fail_page_alloc"):
        _set(f"{name}/ignore-gfp-wait", "N")


def be_quiet() -> None:
    """Keeps what fails out of the kernel's log: a trace of each takes the console longer than all
    else."""
    for name in ("failslab", "fail_page_alloc", "fail_iommufd"):
        _set(f"{name}/verbose", "0")


@contextmanager
def failing(number: int) -> Iterator[None]:
    """The allocation of that number fails, of those that this thread makes in the block.

    Source: Documentation/fault-injection/fault-injection.rst, fail-nth
    """
    fault = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR)
    try:
        os.pwrite(fault, str(number).encode(), 0)
        yield
        os.pwrite(fault, b"0", 0)
    finally:
        os.close(fault)


def outcomes(attempt: Callable[[], T], most: int = 100) -> Iterator[T | OSError]:
    """What comes of `attempt` when its first allocation fails, its second, and so on.

    The last one is what comes of it when none is left to fail. Between two of them the caller puts
    back what was changed.

    Source: Documentation/fault-injection/fault-injection.rst, fail-nth
    """
    allow()
    be_quiet()
    fault = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR)
    try:
        for number in range(1, most):
            outcome: T | OSError
            os.pwrite(fault, str(number).encode(), 0)
            try:
                outcome = attempt()
            except OSError as error:
                outcome = error
            left = int(os.pread(fault, 16, 0))
            os.pwrite(fault, b"0", 0)
            yield outcome
            if left:
                return
        raise AssertionError(f"{most} allocations, and no end of them")
    finally:
        os.close(fault)


@contextmanager
def starved() -> Iterator[None]:
    """Every allocation fails of those that this thread makes in the block, from caches of objects.

    Source: Documentation/fault-injection/fault-injection.rst, task-filter and make-it-fail
    """
    allow()
    be_quiet()
    _set("failslab/task-filter", "Y")
    _set("failslab/times", "-1")
    # To open it again would take memory.
    switch = os.open(f"/proc/self/task/{threading.get_native_id()}/make-it-fail", os.O_RDWR)
    try:
        _set("failslab/probability", "100")
        os.pwrite(switch, b"1", 0)
        try:
            yield
        finally:
            os.pwrite(switch, b"0", 0)
            _set("failslab/probability", "0")
    finally:
        os.close(switch)


def _set(name: str, value: str) -> None:
    with open(f"/sys/kernel/debug/{name}", "w") as file:
        file.write(value)
