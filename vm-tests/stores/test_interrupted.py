"""Tests of stores whose calls an exception interrupts.

Usually one of seven lines is interrupted, in the soak each line.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm import VM
from stores import guest_interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.vm import Kernel


STEP = int(os.environ.get("PYLUO_LINE_STEP", "11"))


# More than the lines of a renewal, without a keeper and with one.
LINES, LINES_WITH_KEEPER = 1200, 3600


class Interrupted:
    """A guest in which calls were interrupted, and the number of stores that each left."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        vm.call(guest_interrupted.allow_many_descriptors)
        self.created = vm.call(guest_interrupted.interrupt_creation, STEP)
        self.discarded = vm.call(guest_interrupted.interrupt_discards, STEP)
        self.added = self._hold(guest_interrupted.interrupt_additions, False)
        self.gone_on = self._hold(guest_interrupted.interrupt_additions, True)
        self.many = self._hold(guest_interrupted.interrupt_additions_of_many)
        self.changed = self._hold(guest_interrupted.interrupt_changes)
        vm.hold(guest_interrupted.make_for_renewals, STEP, LINES)
        vm.live_update()
        vm.call(guest_interrupted.allow_many_descriptors)

    def _hold(self, function: Callable[..., Any], *arguments: object) -> int:
        """Return how many stores the function leaves."""
        held = self.vm.hold(function, STEP, *arguments)
        number: int = self.vm.call(guest_interrupted.length, held)
        return number


@pytest.fixture(scope="module")
def interrupted(kernel: Kernel) -> Iterator[Interrupted]:
    with VM(kernel, call_timeout=900) as vm:
        yield Interrupted(vm)


def test_a_creation_leaves_no_name_taken_and_no_device_open(interrupted: Interrupted) -> None:
    assert interrupted.created > 100
    assert interrupted.discarded > 10


@pytest.mark.parametrize(
    ("prefix", "stores", "names"),
    [
        ("add", "added", ["first", "second", "third"]),
        ("go on", "gone_on", ["first", "second", "third"]),
        ("many", "many", ["first", "0", "1", "2"]),
        ("change", "changed", ["first"]),
    ],
)
def test_an_interrupted_change_and_an_interrupted_retrieval_lose_nothing(
    interrupted: Interrupted, prefix: str, stores: str, names: list[str]
) -> None:
    number = getattr(interrupted, stores)
    assert number * STEP > 80
    done = interrupted.vm.call(guest_interrupted.interrupt_retrievals, STEP, prefix, number, names)
    assert done * STEP > 80


def test_an_interrupted_renewal_and_an_interrupted_finish_lose_nothing(
    interrupted: Interrupted,
) -> None:
    renewed = interrupted._hold(guest_interrupted.interrupt_renewals, LINES)
    assert renewed * STEP > 200
    interrupted.vm.live_update()
    interrupted.vm.call(guest_interrupted.allow_many_descriptors)
    assert interrupted.vm.call(guest_interrupted.interrupt_finishes, STEP, renewed) * STEP > 200


def test_an_interruption_loses_nothing_that_a_keeper_has(kernel: Kernel) -> None:
    """The calls have more lines with a keeper, so that fewer of them are interrupted."""
    step = 3 * STEP if STEP > 1 else 1
    with VM(kernel, call_timeout=900) as vm:
        vm.call(guest_interrupted.allow_many_descriptors)
        vm.hold(guest_interrupted.make_for_renewals, step, LINES_WITH_KEEPER)
        vm.call(guest_interrupted.use_a_shelf)
        assert vm.call(guest_interrupted.interrupt_creation, step) > 300
        assert vm.call(guest_interrupted.interrupt_discards, step) > 10
        vm.hold(guest_interrupted.interrupt_additions_of_many, step)
        vm.live_update()
        vm.call(guest_interrupted.allow_many_descriptors)
        vm.call(guest_interrupted.use_a_shelf)
        held = vm.hold(guest_interrupted.interrupt_renewals, step, LINES_WITH_KEEPER)
        renewed = vm.call(guest_interrupted.length, held)
        assert renewed * step > 600
        vm.live_update()
        vm.call(guest_interrupted.allow_many_descriptors)
        vm.call(guest_interrupted.use_a_shelf)
        assert vm.call(guest_interrupted.interrupt_finishes, step, renewed) == renewed
