from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Kernel
from pyluo.vm.selftests import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Each of pytester's runs has a home of its own, where no kernel is cached.
os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def selftest_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kernel's live update selftests; to be had out of a large archive once."""

    @functools.cache
    def extracted(name: str) -> Path:
        source = Kernel.find(name).source
        assert source is not None
        folder = tmp_path_factory.mktemp(name)
        source.extract([SUITES["liveupdate"].folder], folder)
        return folder / SUITES["liveupdate"].folder

    return extracted
