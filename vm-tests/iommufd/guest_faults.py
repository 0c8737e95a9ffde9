"""What comes of a request when its allocations fail, in a guest of the kernel `selftest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pyluo.guest.faults import each_fails

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
# iommufd's own faults, which only it has: a trace of each takes the console longer than all else.
_VERBOSE = "/sys/kernel/debug/fail_iommufd/verbose"


def outcomes(attempt: Callable[[], T]) -> Iterator[T | OSError]:
    """What comes of `attempt` when its first allocation fails, its second, and so on.

    The last one is what comes of it when none is left to fail. Between two of them the caller puts
    back what was changed.
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
