"""Let the allocations of a request fail, in a guest of the kernel `selftest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pyluo.guest.faults import each_fails

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
# Switches the reports of iommufd's own fault injection off: printing their traces would take longer
# than everything else.
_VERBOSE = "/sys/kernel/debug/fail_iommufd/verbose"


def try_with_each_allocation_failing(attempt: Callable[[], T]) -> Iterator[T | OSError]:
    """Yield the outcomes of `attempt` when its first allocation fails, its second, and so on.

    The last outcome is that of an attempt in which no allocation failed. The caller undoes each
    attempt before it asks for the next outcome.
    """
    with open(_VERBOSE, "w") as file:
        file.write("0")
    for fault in each_fails():
        outcome: T | OSError
        with fault:
            try:
                outcome = attempt()
            except OSError as error:
                outcome = error
        yield outcome
