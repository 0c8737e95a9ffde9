"""Fetch the source packages of kernels from Debian's archive."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import apt, progress
from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["SourcePackage", "fetch", "newest_first"]

_NAME = re.compile(r"linux-source-(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class SourcePackage:
    """A package of Debian that contains the source of a kernel.

    Attributes:
        name: the name of the package, linux-source-X.Y.
        version: the version of the package.
        sha256: the checksum of the .deb file, from the archive's signed index.
        suites: the suites that were read when the package was found.
    """

    name: str
    version: str
    sha256: str
    suites: tuple[str, ...]

    @property
    def series(self) -> tuple[int, int]:
        """The numbers X and Y in the package's name."""
        match = _NAME.fullmatch(self.name)
        assert match is not None
        return int(match[1]), int(match[2])

    @property
    def candidate(self) -> bool:
        """Whether the kernel is a release candidate."""
        return "~rc" in self.version

    @property
    def upstream(self) -> str:
        """The kernel's own version, such as 7.3.4."""
        return self.version.rsplit("-", 1)[0].replace("~", "-")


def newest_first(suites: Sequence[str], *, candidates: bool) -> list[SourcePackage]:
    """Update the package lists, and return the archive's kernel packages, the newest first.

    Args:
        suites: suites of Debian; a suite that cannot be read is reported to the user and left out.
        candidates: whether to include release candidates.

    Raises:
        HarnessError: the archive cannot be reached, or has no kernel source.
    """
    with apt.lock():
        return _list_packages(suites, candidates)


def _list_packages(suites: Sequence[str], candidates: bool) -> list[SourcePackage]:
    readable = [suite for suite in suites if apt.update_lists(suite)]
    if not readable:
        raise HarnessError(
            "the package archive cannot be read",
            "check the network and the system's own `apt-get update`; kernels that are in the "
            "cache already, or a bzImage given by its path, need neither",
        )
    apt.use_suites(readable)
    packages = [
        package
        for name in apt.run("apt-cache", "pkgnames", "linux-source-").split()
        if _NAME.fullmatch(name)
        for package in _list_versions(name, tuple(readable))
        if candidates or not package.candidate
    ]
    if not packages:
        raise HarnessError(
            f"there is no linux-source package in {', '.join(readable)}",
            "add a suite that has one to kernel-config/kernels.toml",
        )
    return sorted(packages, key=functools.cmp_to_key(_compare), reverse=True)


def fetch(package: SourcePackage) -> Path:
    """Return the path of a package's .deb, and download it first unless the cache has it.

    Raises:
        HarnessError: the archive cannot be reached, or no longer has this version.
    """
    folder = apt.folder() / "packages"
    target = folder / f"{package.name}_{package.sha256[:16]}.deb"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with apt.lock():
        if not target.exists():
            apt.use_suites(package.suites)
            _fetch(package, target)
    return target


def _fetch(package: SourcePackage, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=target.parent) as incoming:
        with progress.bar(f"fetching {package.name} {package.version}", 100) as move_bar:
            _download(package, Path(incoming), move_bar)
        (deb,) = Path(incoming).glob("*.deb")
        deb.rename(target)


def _download(package: SourcePackage, folder: Path, move_bar: progress.MoveBar) -> None:
    reading, writing = os.pipe()
    command = [*apt.command("apt-get"), "-o", f"APT::Status-Fd={writing}", "download"]
    process = subprocess.Popen(
        [*command, f"{package.name}={package.version}"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[writing],
        text=True,
        env=apt.environment(),
    )
    os.close(writing)
    try:
        with open(reading) as status:
            for line in status:
                # dlstatus:ITEM:PERCENT:TEXT
                kind, _, percent, *_ = [*line.split(":"), "", "", ""]
                if kind == "dlstatus":
                    move_bar(float(percent))
        _, complaint = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise HarnessError(
            f"{package.name} {package.version} cannot be fetched ({apt.first_error(complaint)})",
            "check the network; if the archive no longer has this version, "
            "`pyluo vm kernel build --update` "
            "chooses another version",
        )


def _list_versions(name: str, suites: tuple[str, ...]) -> Iterable[SourcePackage]:
    for paragraph in apt.run("apt-cache", "show", "--all-versions", name).split("\n\n"):
        fields = dict(re.findall(r"^(\w+): (.*)$", paragraph, re.MULTILINE))
        if "SHA256" in fields:
            yield SourcePackage(name, fields["Version"], fields["SHA256"], suites)


def _compare(one: SourcePackage, other: SourcePackage) -> int:
    if one.series != other.series:
        return 1 if one.series > other.series else -1
    if one.version == other.version:
        return 0
    command = [apt.find_program("dpkg"), "--compare-versions", one.version, "gt", other.version]
    newer = subprocess.run(command)
    return 1 if newer.returncode == 0 else -1
