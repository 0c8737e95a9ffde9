"""From a kernel tree to a verdict: by `pyluo vm bisect`, and by what its developer has anyway.

Each pair builds kernels, so that all of them take hours. The tree is the source of the guests'
kernel, unpacked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.guests import patient_vm
from benchmarks.ratios import Pair
from pyluo.vm import Kernel
from pyluo.vm.cores import usable_cores
from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.ratios import Pairs

__all__ = ["build_ratio", "tree_ratio", "warm_ratio"]

VMTEST = "tools/testing/selftests/liveupdate/vmtest.sh"
CHANGED = "kernel/liveupdate/luo_core.c"  # the file of the tree that gets a line more


def build_ratio(kernel: str, rounds: int) -> Pairs:
    """Build and test the tree with nothing built before, by bisect and by vmtest.sh."""
    with _folder() as tree:
        _unpack(kernel, tree)
        for _ in range(rounds):
            with _folder() as cache, _folder() as objects:
                yield Pair(_bisect(tree, cache), _vmtest(tree, objects))


def warm_ratio(kernel: str, rounds: int) -> Pairs:
    """Test the tree again, with everything built before."""
    with _folder() as tree, _folder() as cache, _folder() as objects:
        _unpack(kernel, tree)
        _bisect(tree, cache)
        _vmtest(tree, objects)
        for _ in range(rounds):
            yield Pair(_bisect(tree, cache), _vmtest(tree, objects))


def tree_ratio(kernel: str, rounds: int) -> Pairs:
    """Change a line of the tree and test it, by bisect, and by make and a boot of our own."""
    with _folder() as tree, _folder() as cache, _folder() as objects:
        _unpack(kernel, tree)
        _bisect(tree, cache)
        config = Kernel.find(kernel).config
        assert config is not None
        shutil.copy(config, objects / ".config")
        _run(_make(tree, objects, "olddefconfig"))
        _make_and_boot(tree, objects)
        for number in range(rounds):
            with (tree / CHANGED).open("a") as source:
                source.write(f"\nstatic int __maybe_unused changed_{number} = {number};\n")
            yield Pair(_bisect(tree, cache), _make_and_boot(tree, objects))


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pyluo-bench-") as name:
        yield Path(name)


def _unpack(kernel: str, folder: Path) -> None:
    source = Kernel.find(kernel).source
    if source is None or source.home is not None:
        raise HarnessError(f"{kernel} has no packed source", "name a kernel of kernels.toml")
    source.unpack(folder)


def _bisect(tree: Path, cache: Path) -> float:
    """Test the tree as `git bisect run` would; return the seconds.

    Args:
        tree: the tree.
        cache: the folder for what pyluo builds.
    """
    command = [sys.executable, "-m", "pyluo", "vm", "bisect", "--tree", os.fspath(tree)]
    return _run(command, {"XDG_CACHE_HOME": os.fspath(cache)})


def _vmtest(tree: Path, objects: Path) -> float:
    """Test the tree by the script in it; return the seconds.

    Args:
        tree: the tree.
        objects: the folder for the objects.
    """
    return _run([os.fspath(tree / VMTEST), "-d", os.fspath(objects)])


def _make_and_boot(tree: Path, objects: Path) -> float:
    """Build the tree, boot its kernel and live-update it to itself; return the seconds."""
    began = time.monotonic()
    _run(_make(tree, objects, "bzImage"))
    with patient_vm(os.fspath(objects / "arch/x86/boot/bzImage")) as vm:
        vm.live_update()
    return time.monotonic() - began


def _make(tree: Path, objects: Path, target: str) -> list[str]:
    return ["make", "-s", "-C", f"{tree}", f"O={objects}", f"-j{usable_cores()}", target]


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """Run a program, which must succeed; return the seconds."""
    began = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HarnessError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - began
