"""Build the kernel's own selftests, without changes, from the source of the kernel to test."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import cache, progress
from pyluo.vm.cores import usable_cores
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import build
from pyluo.vm.packages import how_to_install

if TYPE_CHECKING:
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.kernels.source import Source

__all__ = ["SUITES", "Selftest", "Suite", "find_selftests"]

_SELFTESTS = "tools/testing/selftests"
# The files that the Makefiles and the programs of all suites include.
_COMMON = ("scripts/subarch.include", f"{_SELFTESTS}/*.mk", f"{_SELFTESTS}/*.h")
# The folders of the result, and the list in lib.mk of the programs in each: lib.mk runs the
# programs of the first list itself, and only builds those of the second.
_LISTS = {"alone": "TEST_GEN_PROGS", "staged": "TEST_GEN_PROGS_EXTENDED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite of the kernel's selftests: a folder of programs, and the guest that they need.

    Attributes:
        name: the name of the folder.
        kernel: the name of the kernel that is tested by default.
        append: more words for the kernel's command line.
        needs: patterns of the paths of further files in the kernel's tree that the programs
            include.
        libraries: the libraries that the programs need, each as the path of a header and the Debian
            package that contains the header.
    """

    name: str
    kernel: str = "stable"
    append: str = ""
    needs: tuple[str, ...] = ()
    libraries: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """The path of the suite's folder in the kernel's tree."""
        return f"{_SELFTESTS}/{self.name}"


SUITES = {
    suite.name: suite
    for suite in (
        Suite(name="liveupdate"),
        Suite(
            name="iommu",
            kernel="selftest",
            # The tests map 64 huge pages at once. iommufd_fail_nth makes allocations fail to see
            # whether the kernel warns then; the program itself cannot detect a warning, so a
            # warning must be a panic.
            append="hugepages=80 panic_on_warn=1",
            needs=("drivers/iommu/iommufd/iommufd_test.h",),
            libraries=(("/usr/include/sys/capability.h", "libcap-dev"),),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Selftest:
    """A test program of the kernel's selftests.

    Attributes:
        path: the path of the executable.
        staged: whether the program needs a live update. If it does, it is run with `-s 1` before
            the jump and leaves a daemon that keeps its sessions open; after the jump it is run with
            `-s 2` and looks for these sessions. A program that is not staged reports in KTAP.
    """

    path: Path
    staged: bool

    @property
    def name(self) -> str:
        """The name of the program."""
        return self.path.name


def find_selftests(suite: Suite, kernel: Kernel) -> list[Selftest]:
    """Return the programs of a suite, and build them first unless the cache has them.

    The programs are compiled on the host, by the suite's own Makefile, with the headers of the
    kernel to test.

    Raises:
        HarnessError: the kernel's source is not known or has no such suite, a library is missing,
            or the suite does not compile.
    """
    if kernel.source is None or kernel.headers is None:
        raise HarnessError(
            f"the selftests of {kernel.name} cannot be built, because its source is not known",
            "name a kernel of kernels.toml, or give the path of a tree or a tarball",
        )
    target = cache.folder() / "selftests" / _key(suite, kernel.source, kernel.headers)
    if not target.exists():
        with cache.lock("selftests", lambda: progress.say("waiting for another build to end")):
            if not target.exists():
                _build(suite, kernel.source, kernel.headers, target)
    return [
        Selftest(path, folder == "staged")
        for folder in _LISTS
        for path in sorted((target / folder).iterdir())
    ]


def _build(suite: Suite, source: Source, headers: Path, target: Path) -> None:
    _check_libraries(suite)
    progress.say(f"building the selftests {suite.name} of {source.description}, once")
    target.parent.mkdir(exist_ok=True)
    state = source.scan()
    for leftover in target.parent.glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
        tree, objects, result = (Path(scratch, name) for name in ("tree", "objects", "result"))
        for folder in (tree, objects, result):
            folder.mkdir()
        with progress.bar("unpacking", None):
            source.extract([*_COMMON, suite.folder, *suite.needs], tree)
        with progress.bar("compiling", None):
            _compile(suite, tree, headers, objects, result)
        if source.scan() != state or _key(suite, source, headers) != target.name:
            raise HarnessError(f"{source.description} changed while it was built", "run it again")
        result.rename(target)


def _compile(suite: Suite, tree: Path, headers: Path, objects: Path, result: Path) -> None:
    make = [
        "make", "--no-print-directory", "-C", os.fspath(tree / suite.folder),
        f"OUTPUT={objects}", f"KHDR_INCLUDES=-isystem {headers}",
    ]  # fmt: skip
    what = f"building the selftests {suite.name}"
    build.run_step(what, [*make, f"-j{usable_cores()}"])
    for folder, variable in _LISTS.items():
        (result / folder).mkdir()
        rule = f"pyluo-list: ; @echo $({variable})"
        *_, names = build.run_step(what, [*make, "--silent", "--eval", rule, "pyluo-list"])
        for name in names.split():
            shutil.copy2(objects / Path(name).name, result / folder)
    if not any(result.glob("*/*")):
        raise HarnessError(f"the selftests {suite.name} of this kernel declare no program")


def _check_libraries(suite: Suite) -> None:
    missing = [package for header, package in suite.libraries if not Path(header).exists()]
    if missing:
        raise HarnessError(
            f"building the selftests {suite.name} needs {' '.join(missing)}",
            how_to_install(missing),
        )


def _key(suite: Suite, source: Source, headers: Path) -> str:
    """Return the name of the programs' folder in the cache: a digest of all that they depend on.

    The folder of the kernel's headers names the kernel's build: the tree may have changed since.
    """
    depends_on = [source.identity, os.fspath(headers), suite.name, suite.needs]
    parts = [*depends_on, build.toolchain()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
