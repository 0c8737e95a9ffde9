"""Allocations that fail on purpose, in a guest of the kernel `selftest`."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def allow() -> None:
    """Lets those fail that may wait for memory, which is most of them."""
    for name in ("failslab", "fail_page_alloc"):
        with open(f"/sys/kernel/debug/{name}/ignore-gfp-wait", "w") as file:
            file.write("N")


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
