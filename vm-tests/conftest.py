from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from guest_state import read_state
from hypothesis import HealthCheck, settings

from pyluo.vm import VM, Kernel
from pyluo.vm.pytest.fixtures import FAILED, expected_causes
from pyluo.vm.run.selftests import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyluo.vm.errors import Cause
    from pyluo.vm.machine.options import GuestOptions

# Set this before pytester changes HOME: the tests that it runs need the cache of kernels, too.
os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

pytest_plugins = ["pytester"]

# How long an example takes says more of the machine's load than of the code.
settings.register_profile("pyluo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyluo")

ROOT = Path(__file__).parent.parent
# Each of the longest tests begins first in a worker, so that none is left with one of them while
# the others wait.
LONGEST = (
    "test_the_culprit_is_found_though_a_commit_does_not_compile",
    "test_a_vms_ram_outlives_kills_after_each_step_restarts_and_updates",
    "test_any_order_of_requests_and_jumps_does_what_the_manual_says",
    "test_a_store_is_renewed_hop_after_hop_and_nothing_is_lost",
    "test_an_example_passes_and_records_the_gap_of_its_vm",
)
KUNIT = "tools/testing/kunit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest = [item for item in items if item.name.partition("[")[0] in LONGEST]
    items[:] = [item for item in items if item not in longest]
    # pytest-xdist first gives each worker an equal part of the list.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    part = -(-(len(items) + len(longest)) // workers)
    for number, item in enumerate(longest):
        items.insert(number % workers * part + number // workers, item)


@pytest.fixture(scope="session")
def selftest_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that returns the folder of a suite of selftests, from the source of a kernel.

    Its arguments are the names of the kernel and of the suite. It extracts each suite only once,
    because the archive is large.
    """

    @functools.cache
    def extracted(kernel: str, suite: str = "liveupdate") -> Path:
        source = Kernel.find(kernel).source
        assert source is not None
        folder = tmp_path_factory.mktemp(kernel)
        source.extract([SUITES[suite].folder], folder)
        return folder / SUITES[suite].folder

    return extracted


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a virtual environment in which pyluo is installed from a copy of the checkout.

    The dependencies come from this process's environment, so that nothing is downloaded.
    """
    copy = tmp_path_factory.mktemp("source") / "pyluo"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, copy, ignore=left_out)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    base = {"base": os.fspath(folder), "platbase": os.fspath(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", base))
    # A .pth file adds this process's packages to sys.path. Python does not read the .pth files in
    # folders that are added this way, so an editable pyluo there cannot be imported.
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "ours.pth").write_text("\n".join(ours))
    install = [
        *(sys.executable, "-m", "pip", "--python", os.fspath(folder / "bin" / "python")),
        *("install", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"),
        os.fspath(copy),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def kunit_parser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module `kunit_parser`, the kernel's own KTAP parser, from the source of `stable`."""
    source = Kernel.find("stable").source
    assert source is not None
    tree = tmp_path_factory.mktemp("kunit")
    source.extract([KUNIT], tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tree / KUNIT)
        yield importlib.import_module("kunit_parser")


class GuestPool:
    """Guests that the tests of a worker use one after the other.

    A guest that a test has used is kept for the next test if its state is the same as after its
    cold boot, even if the test jumped. So the next test need not boot a guest.
    """

    MAX = 1  # guests that are kept while no test uses them, at most; each takes a gibibyte

    def __init__(self) -> None:
        self._waiting: dict[str, VM] = {}
        self._first_states: dict[str, dict[str, object]] = {}
        self._markers: dict[tuple[str, str], int] = {}
        self.in_use: dict[str, VM] = {}

    def take(self, key: str, make: Callable[[], VM]) -> VM:
        """Return a guest for the current test, in the state in which it was after its cold boot.

        Args:
            key: names the options of the guest; only a guest with the same key is used again.
            make: returns a new guest with these options, not booted yet.
        """
        if key in self.in_use:
            return self.in_use[key]
        guest = self._waiting.pop(key, None)
        if guest is None:
            while len(self._waiting) >= self.MAX:
                self._waiting.pop(next(iter(self._waiting))).close()
            guest = make().__enter__()
            try:
                self._first_states[key] = guest.call(read_state)
            except BaseException:
                guest.close()
                raise
        self.in_use[key] = guest
        return guest

    def give_back(self, expected: Sequence[Cause], *, keep: bool) -> None:
        """Take back all guests from a test: keep a guest if its state allows it, else end it.

        Args:
            expected: the complaints and deaths that the test expects.
            keep: whether guests may be kept; false if the test failed.

        Raises:
            KernelComplaint: a kernel complained of something that the test does not expect.
        """
        with ExitStack() as stack:
            stack.callback(self._end_all_in_use)  # if a check fails before all were looked at
            while self.in_use:
                key, guest = self.in_use.popitem()
                if not keep or not guest.running:
                    guest.close()
                    continue
                on_failure = stack.enter_context(ExitStack())
                on_failure.callback(guest.close)
                guest.check(*expected)
                if not guest.dead and self._is_like_new(key, guest):
                    guest.check(*expected)  # so that the next test has nothing of this to check
                    on_failure.pop_all()
                    self._waiting[key] = guest

    def close(self) -> None:
        """End all guests."""
        self._end_all_in_use()
        while self._waiting:
            self._waiting.popitem()[1].close()

    def _end_all_in_use(self) -> None:
        while self.in_use:
            self.in_use.popitem()[1].close()

    def _is_like_new(self, key: str, guest: VM) -> bool:
        """Return whether a guest's state is the same as after its cold boot, and it holds nothing.

        The numbers of held objects are consecutive. If the number of a new one does not follow the
        number at the last check, the test has held an object, and may not have released it.
        """
        marker = guest.hold(int)
        guest.release(marker)
        life = key, guest.boot_id
        before, self._markers[life] = self._markers.get(life, 0), marker.number
        return marker.number == before + 1 and guest.call(read_state) == self._first_states[key]


@pytest.fixture(scope="session")
def pool() -> Iterator[GuestPool]:
    with closing(GuestPool()) as pool:
        yield pool


@pytest.fixture
def pooled(pool: GuestPool, request: pytest.FixtureRequest) -> Iterator[GuestPool]:
    """The pool of guests; after the test, it takes its guests back."""
    yield pool
    failed = request.node.stash.get(FAILED, False)
    pool.give_back(expected_causes(request.node), keep=not failed)


@pytest.fixture
def guest(pooled: GuestPool) -> Callable[..., VM]:
    """A function that returns a guest in the state after its cold boot.

    Its arguments are the name of a kernel, and options of `VM`.
    """

    def take(kernel: str, **options: Any) -> VM:
        return pooled.take(f"{kernel} {options}", lambda: VM(kernel, **options))

    return take


@pytest.fixture
def vm(pooled: GuestPool, pyluo_options: GuestOptions, kernel: Kernel, next_kernel: Kernel) -> VM:
    """A guest in the state after its cold boot.

    This replaces the plugin's fixture, which boots a guest for each test.
    """
    key = f"{kernel.image} to {next_kernel.image}"
    return pooled.take(key, lambda: pyluo_options.guest(kernel, next_kernel))


@pytest.fixture
def cold_vm(
    pyluo_options: GuestOptions, kernel: Kernel, next_kernel: Kernel, request: pytest.FixtureRequest
) -> Iterator[VM]:
    """A guest that was booted for this test and ends after it.

    This is for tests that depend on how much memory a guest has: after a jump, a kernel counts the
    scratch areas as memory.
    """
    guest = pyluo_options.guest(kernel, next_kernel, expects=expected_causes(request.node))
    with closing(guest.__enter__()):
        yield guest
        if guest.running and not request.node.stash.get(FAILED, False):
            guest.check(*expected_causes(request.node))


@pytest.fixture(scope="module")
def mock_vm() -> Iterator[Callable[[], VM]]:
    """A function that returns a guest with iommufd's mock device, whose kernel panics at a warning.

    The tests of a module share the guest; if it died, the function boots another one.
    """
    with ExitStack() as stack:
        guests: list[VM] = []

        def get() -> VM:
            if not guests or guests[-1].dead:
                guests.append(stack.enter_context(VM("selftest", append="panic_on_warn=1")))
            return guests[-1]

        yield get
