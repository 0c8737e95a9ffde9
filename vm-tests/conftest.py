from __future__ import annotations

import functools
import importlib
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm import VM, Kernel
from pyluo.vm.selftests import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Each of pytester's runs has a home of its own, where no kernel is cached.
os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

pytest_plugins = ["pytester"]

KUNIT = "tools/testing/kunit"


@pytest.fixture(scope="session")
def selftest_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of one of a kernel's suites of selftests; to be had out of a large archive once.

    It is given the kernel's name, and the suite's unless that is `liveupdate`.
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
def kunit_parser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The kernel's own parser of KTAP, a module, out of the source of the kernel `stable`."""
    source = Kernel.find("stable").source
    assert source is not None
    tree = tmp_path_factory.mktemp("kunit")
    source.extract([KUNIT], tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tree / KUNIT)
        yield importlib.import_module("kunit_parser")


@pytest.fixture(scope="module")
def mock_vm() -> Iterator[Callable[[], VM]]:
    """A guest whose kernel has iommufd's mock device, and ends at a warning; anew if it ended."""
    with ExitStack() as stack:
        guests: list[VM] = []

        def alive() -> VM:
            if not guests or guests[-1].dead:
                guests.append(stack.enter_context(VM("selftest", append="panic_on_warn=1")))
            return guests[-1]

        yield alive
