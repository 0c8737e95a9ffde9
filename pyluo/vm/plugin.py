"""The pytest plugin: fixtures for guests and for what runs in them, a marker for tests that run
inside one, and the count.

A test that passed fails all the same if a guest's kernel warned meanwhile, or worse; the marker
`expects_death` names what a test expects.

Loaded by its entry point wherever `pyluo[vm]` is installed; until a test asks for a guest, it
imports nothing of the harness.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm.subtests import Ktap, tell_apart

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from pyluo.vm import VM, Death, Kernel
    from pyluo.vm.usage import Usage

__all__: list[str] = []

_MARKER = "in_guest"
_EXPECTS = "expects_death"
_FIXTURES = ("kernel", "shared_vm", "vm")
_CONSOLE_LINES = 60


@dataclass(slots=True)
class _Count:
    """What the tests of this process, and of the workers it started, did.

    Attributes:
        ran: how many tests there were.
        drove: how many of them did something with a guest.
        boots: how many guests the workers started.
        live_updates: how many jumps those made.
    """

    ran: int = 0
    drove: int = 0
    boots: int = 0
    live_updates: int = 0

    def add(self, others: Mapping[str, int]) -> None:
        """Adds what another process counted."""
        for name, value in others.items():
            setattr(self, name, getattr(self, name) + value)


_count_key = pytest.StashKey[_Count]()
_guest_key = pytest.StashKey["VM"]()
_failed_key = pytest.StashKey[bool]()
_shared_key = pytest.StashKey["_SharedGuest"]()
_OUTPUT = "pyluo"  # of a worker of pytest-xdist: what it counted
_MEMORY_OF_A_GUEST = 3 << 29  # bytes; the usual one has 1 GiB, and QEMU and Python need theirs


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("pyluo", "guests to live-update")
    group.addoption(
        "--pyluo-kernel",
        default="stable",
        help="the kernel of the fixtures `kernel`, `vm` and `shared_vm`: a name, or the path of a "
        "bzImage, a tree or a tarball (default: stable)",
    )


@pytest.hookimpl(trylast=True)  # once there is a report in JUnit's XML, if one is asked for
def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker, and begins the count."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}: the body of this test runs in a guest: that of the fixture vm if the test "
        f"uses it, else the shared one",
    )
    config.addinivalue_line(
        "markers",
        f"{_EXPECTS}(death, ...): a guest's kernel may complain of these in a test that passes",
    )
    config.stash[_count_key] = _Count()
    tell_apart(config)


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """The kernel that --pyluo-kernel names, built if need be."""
    from pyluo.vm import Kernel

    return Kernel.find(request.config.getoption("--pyluo-kernel"))


@pytest.fixture
def vm(kernel: Kernel, request: pytest.FixtureRequest) -> Iterator[VM]:
    """A fresh guest, gone after the test."""
    from pyluo.vm import VM

    # No look at what the kernel complained of when it ends: a test that passed has had it.
    with closing(VM(kernel, expects=_expected(request.node)).__enter__()) as guest:
        request.node.stash[_guest_key] = guest
        yield guest


@pytest.fixture
def shared_vm(_shared: _SharedGuest, request: pytest.FixtureRequest) -> VM:
    """A guest for tests that leave nothing behind; booted again if it died, or a test failed."""
    request.node.stash[_guest_key] = guest = _shared.alive()
    request.node.stash[_shared_key] = _shared
    return guest


@pytest.fixture
def ktap(subtests: pytest.Subtests) -> Ktap:
    """Runs a program in a guest, `ktap(vm, argv)`, and makes each case it reports a subtest."""
    return Ktap(subtests)


@pytest.fixture(scope="session")
def _shared(kernel: Kernel) -> Iterator[_SharedGuest]:
    shared = _SharedGuest(kernel)
    yield shared
    shared.close()


class _SharedGuest:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._vm: VM | None = None

    def alive(self) -> VM:
        from pyluo.vm import VM

        if self._vm is None or self._vm.dead:
            self.close()
            self._vm = VM(self._kernel).__enter__()
        return self._vm

    def replace(self, guest: VM) -> None:
        """Boots another for the next test, if this is it: who failed may have left something."""
        if guest is self._vm:
            self.close()

    def close(self) -> None:
        if self._vm is not None:
            self._vm.close()
            self._vm = None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a marked test's body in the guest."""
    if pyfuncitem.get_closest_marker(_MARKER) is None:
        return None
    fixture = "vm" if "vm" in pyfuncitem.fixturenames else "shared_vm"
    guest = pyfuncitem._request.getfixturevalue(fixture)
    names = pyfuncitem._fixtureinfo.argnames
    if any(name in _FIXTURES for name in names):
        pytest.fail(
            f"this test runs in the guest, where there is no {' or '.join(_FIXTURES)}: "
            f"ask for a fresh guest by @pytest.mark.usefixtures('vm')",
            pytrace=False,
        )
    guest.call(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fails a test that passed while the kernel of a guest complained."""
    with ExitStack() as stack:
        for guest in _running():
            stack.enter_context(guest.expecting(*_expected(item)))
        yield
        for guest in _running():
            guest.check()


def _expected(item: pytest.Item) -> tuple[Death, ...]:
    return tuple(death for marker in item.iter_markers(_EXPECTS) for death in marker.args)


def _running() -> list[VM]:
    from pyluo.vm.usage import usage

    return list(usage.running)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Counts the tests, and those that did something with a guest."""
    before = _usage()
    result = yield
    count = item.config.stash[_count_key]
    count.ran += 1
    count.drove += _usage() != before
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the console of the guest with a test that failed."""
    report = yield
    guest = item.stash.get(_guest_key, None)
    if guest is not None and guest.running and report.failed and report.when == "call":
        lines = guest.console.splitlines()[-_CONSOLE_LINES:]
        report.sections.append(("The guest's console", "\n".join(lines)))
        item.stash[_failed_key] = True
    shared = item.stash.get(_shared_key, None)
    # Not before: after a subtest that failed, the test goes on.
    if report.when == "teardown" and guest and shared and item.stash.get(_failed_key, False):
        shared.replace(guest)
    return report


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: as many workers as have a core each, and memory for a guest each."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // _MEMORY_OF_A_GUEST))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends home what this worker has counted."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        usage = _usage()
        count = session.config.stash[_count_key]
        count.add({"boots": usage.boots, "live_updates": usage.live_updates})
        output[_OUTPUT] = asdict(count)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what a worker has counted; one that crashed says nothing."""
    counted = getattr(node, "workeroutput", {}).get(_OUTPUT, {})
    node.config.stash[_count_key].add(counted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many tests used a guest, and how many guests and jumps that took."""
    usage = _usage()
    count = terminalreporter.config.stash[_count_key]
    count.add({"boots": usage.boots, "live_updates": usage.live_updates})
    if count.boots:
        terminalreporter.write_line(
            f"vm-tests: {count.ran} ran, {count.drove} of them drove a guest; "
            f"guests booted: {count.boots}, live updates made: {count.live_updates}"
        )


def _usage() -> Usage:
    """What this process has done with guests so far."""
    from pyluo.vm.usage import usage

    return replace(usage, running=[])
