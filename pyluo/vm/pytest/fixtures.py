"""The fixtures of the plugin: guests and kernels."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm.errors import Cause
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.options import GuestOptions
    from pyluo.vm.machine.vm import VM
    from pyluo.vm.pytest.subtests import Ktap

__all__ = ["EXPECTS", "FAILED", "GUEST_FIXTURES", "expected_causes", "replace_shared"]

GUEST_FIXTURES = ("kernel", "shared_vm", "vm")  # a test that runs in a guest cannot use these
EXPECTS = "expects"  # the marker that names complaints and deaths that do not fail a test
FAILED = pytest.StashKey[bool]()  # in a test's stash: whether one of its phases has failed
_PREFIX = "pyluo_"  # the prefix of the attributes of pytest's options
_guest_key = pytest.StashKey["VM"]()
_shared_key = pytest.StashKey["_SharedGuest"]()


@pytest.fixture(scope="session")
def pyluo_options(pytestconfig: pytest.Config) -> GuestOptions:
    from pyluo.vm.machine.options import GuestOptions

    return GuestOptions.of(pytestconfig.option, _PREFIX)


@pytest.fixture(scope="session")
def kernel(pyluo_options: GuestOptions) -> Kernel:
    """Return the kernel that --pyluo-kernel names, built if it is not in the cache."""
    return pyluo_options.find_kernel()


@pytest.fixture(scope="session")
def pyluo_to(pyluo_options: GuestOptions) -> Kernel | None:
    return pyluo_options.find_next()


# Not for the session: tests may replace `kernel` by a fixture with a narrower scope.
@pytest.fixture
def next_kernel(pyluo_to: Kernel | None, kernel: Kernel) -> Kernel:
    """Return the kernel that guests live-update to: --pyluo-to names it; by default, `kernel`."""
    return pyluo_to or kernel


@pytest.fixture(scope="session")
def hops(pytestconfig: pytest.Config) -> int:
    """Return the value of --pyluo-hops: how many live updates in a row a test should make."""
    number: int = pytestconfig.getoption("--pyluo-hops")
    return number


@pytest.fixture
def vm(
    pyluo_options: GuestOptions, kernel: Kernel, next_kernel: Kernel, request: pytest.FixtureRequest
) -> Iterator[VM]:
    """Boot a guest for this test, and end the guest after the test."""
    guest = pyluo_options.guest(kernel, next_kernel, expects=expected_causes(request.node))
    with closing(guest.__enter__()):
        yield guest
        _check_at_end(request.node, guest)


@pytest.fixture
def shared_vm(pyluo_shared: _SharedGuest, request: pytest.FixtureRequest) -> Iterator[VM]:
    """Return a guest that several tests use; they must leave nothing behind in it.

    After a test that failed, the next test gets a fresh guest.
    """
    request.node.stash[_guest_key] = guest = pyluo_shared.get()
    request.node.stash[_shared_key] = pyluo_shared
    yield guest
    _check_at_end(request.node, guest)


@pytest.fixture
def ktap(subtests: pytest.Subtests) -> Ktap:
    """Return a function `ktap(vm, argv)`: it runs a program that reports in KTAP in a guest, and
    makes each of the program's cases a subtest.
    """
    from pyluo.vm.pytest.subtests import Ktap

    return Ktap(subtests)


@pytest.fixture(scope="session")
def pyluo_shared(
    pyluo_options: GuestOptions, kernel: Kernel, pyluo_to: Kernel | None
) -> Iterator[_SharedGuest]:
    with closing(_SharedGuest(pyluo_options, kernel, pyluo_to)) as shared:
        yield shared


class _SharedGuest:
    def __init__(self, options: GuestOptions, kernel: Kernel, to: Kernel | None) -> None:
        self._options = options
        self._kernels = kernel, to
        self._vm: VM | None = None

    def get(self) -> VM:
        """Return the shared guest; boot a guest if there is none, or if it is dead."""
        if self._vm is None or self._vm.dead:
            self.close()
            self._vm = self._options.guest(*self._kernels).__enter__()
        return self._vm

    def replace(self, guest: VM) -> None:
        """End a guest if it is the shared one, so that `get` boots another one."""
        if guest is self._vm:
            self.close()

    def close(self) -> None:
        if self._vm is not None:
            self._vm.close()
            self._vm = None


def _check_at_end(item: pytest.Item, guest: VM) -> None:
    """Check a guest after the fixtures that use it have ended, unless the test has failed."""
    if guest.running and not item.stash.get(FAILED, False):
        guest.check(*expected_causes(item))


def expected_causes(item: pytest.Item) -> tuple[Cause, ...]:
    """Return the complaints and deaths that the markers of a test expect."""
    return tuple(cause for marker in item.iter_markers(EXPECTS) for cause in marker.args)


def replace_shared(item: pytest.Item) -> None:
    """End the shared guest if this test used it, so that the next test gets a fresh one."""
    if shared := item.stash.get(_shared_key, None):
        shared.replace(item.stash[_guest_key])
