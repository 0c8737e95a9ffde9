from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm import VM, Kernel
from pyluo.vm.run.selftests import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Each of pytester's runs has a home of its own, where no kernel is cached.
os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
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
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another environment, which pyluo is installed in from a copy of the checkout.

    What pyluo stands on is this environment's, so that nothing is downloaded.
    """
    copy = tmp_path_factory.mktemp("source") / "pyluo"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, copy, ignore=left_out)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    base = {"base": os.fspath(folder), "platbase": os.fspath(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", base))
    # Of a folder that is named so, no .pth file counts: not that of an editable pyluo either.
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
