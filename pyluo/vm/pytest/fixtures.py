"""Part of the pytest plugin: guests and kernels as fixtures."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from pyluo.vm.machine.options import GuestOptions
from pyluo.vm.pytest.subtests import Ktap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import VM, Death, Kernel

__all__ = ["EXPECTS", "FAILED", "FIXTURES", "expected", "replace_shared"]

FIXTURES = ("kernel", "shared_vm", "vm")  # which there are not in a guest
EXPECTS = "expects_death"  # the marker that says what a guest's kernel may complain of
FAILED = pytest.StashKey[bool]()  # of a test: whether some phase of it has
_PREFIX = "pyluo_"  # of the options, as attributes
_guest_key = pytest.StashKey["VM"]()
_shared_key = pytest.StashKey["_SharedGuest"]()


@pytest.fixture(scope="session")
def _options(pytestconfig: pytest.Config) -> GuestOptions:
    return GuestOptions.of(pytestconfig.option, _PREFIX)


@pytest.fixture(scope="session")
def kernel(_options: GuestOptions) -> Kernel:
    """The kernel that --pyluo-kernel names, built if need be."""
    return _options.find_kernel()


@pytest.fixture(scope="session")
def _to(_options: GuestOptions) -> Kernel | None:
    return _options.find_next()


@pytest.fixture  # of no wider scope than a `kernel` that tests put in the place of the one above
def next_kernel(_to: Kernel | None, kernel: Kernel) -> Kernel:
    """The kernel that guests live-update to: --pyluo-to names it; without it, `kernel` again."""
    return _to or kernel


@pytest.fixture(scope="session")
def hops(pytestconfig: pytest.Config) -> int:
    """How many live updates in a row a test is to make that can make several: --pyluo-hops."""
    number: int = pytestconfig.getoption("--pyluo-hops")
    return number


@pytest.fixture
def vm(
    _options: GuestOptions, kernel: Kernel, next_kernel: Kernel, request: pytest.FixtureRequest
) -> Iterator[VM]:
    """A fresh guest, gone after the test."""
    guest = _options.guest(kernel, next_kernel, expects=expected(request.node))
    with closing(guest.__enter__()):
        yield guest
        _look(request.node, guest)


@pytest.fixture
def shared_vm(_shared: _SharedGuest, request: pytest.FixtureRequest) -> Iterator[VM]:
    """A guest for tests that leave nothing behind; booted again if it died, or a test failed."""
    request.node.stash[_guest_key] = guest = _shared.alive()
    request.node.stash[_shared_key] = _shared
    yield guest
    _look(request.node, guest)


@pytest.fixture
def ktap(subtests: pytest.Subtests) -> Ktap:
    """Runs a program in a guest, `ktap(vm, argv)`, and makes each case it reports a subtest."""
    return Ktap(subtests)


@pytest.fixture(scope="session")
def _shared(_options: GuestOptions, kernel: Kernel, _to: Kernel | None) -> Iterator[_SharedGuest]:
    with closing(_SharedGuest(_options, kernel, _to)) as shared:
        yield shared


class _SharedGuest:
    def __init__(self, options: GuestOptions, kernel: Kernel, to: Kernel | None) -> None:
        self._options = options
        self._kernels = kernel, to
        self._vm: VM | None = None

    def alive(self) -> VM:
        if self._vm is None or self._vm.dead:
            self.close()
            self._vm = self._options.guest(*self._kernels).__enter__()
        return self._vm

    def replace(self, guest: VM) -> None:
        """Boots another for the next test, if this is it: who failed may have left something."""
        if guest is self._vm:
            self.close()

    def close(self) -> None:
        if self._vm is not None:
            self._vm.close()
            self._vm = None


def _look(item: pytest.Item, guest: VM) -> None:
    """Looks for what the kernel complained of while other fixtures ended, unless there is a failure
    to tell already."""
    if guest.running and not item.stash.get(FAILED, False):
        guest.check(*expected(item))


def expected(item: pytest.Item) -> tuple[Death, ...]:
    """What the kernel of a guest may complain of in a test."""
    return tuple(death for marker in item.iter_markers(EXPECTS) for death in marker.args)


def replace_shared(item: pytest.Item) -> None:
    """Gives the next test another shared guest, if this one had it."""
    if shared := item.stash.get(_shared_key, None):
        shared.replace(item.stash[_guest_key])
