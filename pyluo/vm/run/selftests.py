"""Build the kernel's own selftests, unmodified, from the source that a kernel was built from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import build, cache

if TYPE_CHECKING:
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.kernels.source import Source

__all__ = ["SUITES", "Selftest", "Suite", "find_selftests"]

_SELFTESTS = "tools/testing/selftests"
# The files that every suite's Makefile and every test include.
_COMMON = ("scripts/subarch.include", f"{_SELFTESTS}/*.mk", f"{_SELFTESTS}/*.h")
# The lists of lib.mk: programs that it runs, and programs that it only builds. Each list has a
# folder in the result.
_LISTS = {"alone": "TEST_GEN_PROGS", "staged": "TEST_GEN_PROGS_EXTENDED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A folder of the kernel's selftests, and the guest that it needs.

    Attributes:
        name: the name of the folder.
        kernel: the kernel that is tested if none is named.
        append: more words for the kernel's command line.
        needs: patterns of further paths in the kernel's tree that its programs include.
        libraries: the libraries that its programs need, each as the path of a header and the
            Debian package that brings it.
    """

    name: str
    kernel: str = "stable"
    append: str = ""
    needs: tuple[str, ...] = ()
    libraries: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """The folder's path in the kernel's tree."""
        return f"{_SELFTESTS}/{self.name}"


SUITES = {
    suite.name: suite
    for suite in (
        Suite(name="liveupdate"),
        Suite(
            name="iommu",
            kernel="selftest",
            # The tests map 64 huge pages at once. iommufd_fail_nth provokes failures to see whether
            # the kernel warns, which it cannot see itself.
            append="hugepages=80 panic_on_warn=1",
            needs=("drivers/iommu/iommufd/iommufd_test.h",),
            libraries=(("/usr/include/sys/capability.h", "libcap-dev"),),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Selftest:
    """A test program of the kernel's.

    Attributes:
        path: the path of the executable.
        staged: whether it needs a live update. Run with `-s 1` before the jump, it leaves a daemon
            that holds its sessions; run with `-s 2` after the jump, it looks for them. A program
            that is not staged reports in KTAP.
    """

    path: Path
    staged: bool

    @property
    def name(self) -> str:
        """The program's name in the kernel's tree."""
        return self.path.name


def find_selftests(suite: Suite, kernel: Kernel) -> list[Selftest]:
    """Return the programs of a suite, built from the kernel's source unless the cache has them.

    They are compiled on the host, by the kernel's own Makefile, against the headers that this
    kernel installs.

    Raises:
        HarnessError: the kernel's source is not known, it has no such suite, a library is missing,
            or the suite does not compile.
    """
    if kernel.source is None or kernel.headers is None:
        raise HarnessError(
            f"the selftests of {kernel.name} cannot be built, because its source is not known",
            "name a kernel of kernels.toml, or give the path of a tree or a tarball",
        )
    target = cache.folder() / "selftests" / _key(suite, kernel.source)
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
        if _key(suite, source) != target.name:
            raise HarnessError(f"{source.description} changed while it was built", "run it again")
        result.rename(target)


def _compile(suite: Suite, tree: Path, headers: Path, objects: Path, result: Path) -> None:
    make = [
        "make", "--no-print-directory", "-C", os.fspath(tree / suite.folder),
        f"OUTPUT={objects}", f"KHDR_INCLUDES=-isystem {headers}",
    ]  # fmt: skip
    what = f"building the selftests {suite.name}"
    build.run_step(what, [*make, f"-j{os.cpu_count() or 1}"])
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
        names = " ".join(missing)
        raise HarnessError(
            f"building the selftests {suite.name} needs {names}", f"apt install {names}"
        )


def _key(suite: Suite, source: Source) -> str:
    """Return the name of the programs in the cache: a digest of all that they are made of.

    The headers follow from the source.
    """
    parts = [source.identity, suite.name, suite.needs, build.compiler()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
