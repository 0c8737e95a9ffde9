"""Fetch the source packages of kernels from Debian's archive, with apt.

The state of the system's own apt does not change: the sources list, the package lists and the cache
are private, and nothing is installed. The mirror is the same as the system's, and signatures are
checked against Debian's keyring.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

__all__ = ["SourcePackage", "fetch", "newest_first"]

_KEYRING_SUFFIXES = ("gpg", "pgp")  # up to Debian 12, and since Debian 13
_MIRROR = "PYLUO_DEBIAN_MIRROR"
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
    with _lock():
        return _list_packages(suites, candidates)


def _list_packages(suites: Sequence[str], candidates: bool) -> list[SourcePackage]:
    readable = [suite for suite in suites if _update_lists(suite)]
    if not readable:
        raise HarnessError(
            "the package archive cannot be read",
            "check the network and the system's own `apt-get update`; kernels that are in the "
            "cache already, or a bzImage given by its path, need neither",
        )
    _write_sources(readable)
    packages = [
        package
        for name in _apt("apt-cache", "pkgnames", "linux-source-").split()
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
    folder = _folder() / "packages"
    target = folder / f"{package.name}_{package.sha256[:16]}.deb"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _lock():
        if not target.exists():
            _write_sources(package.suites)
            _fetch(package, target)
    return target


def _fetch(package: SourcePackage, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=target.parent) as incoming:
        with progress.bar(f"fetching {package.name} {package.version}", 100) as move_bar:
            _download(package, Path(incoming), move_bar)
        (deb,) = Path(incoming).glob("*.deb")
        deb.rename(target)


def _lock() -> AbstractContextManager[None]:
    return cache.lock("apt", lambda: progress.say("waiting for another run to read the archive"))


def _download(package: SourcePackage, folder: Path, move_bar: progress.MoveBar) -> None:
    reading, writing = os.pipe()
    command = [*_command("apt-get"), "-o", f"APT::Status-Fd={writing}", "download"]
    process = subprocess.Popen(
        [*command, f"{package.name}={package.version}"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[writing],
        text=True,
        env=_environment(),
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
            f"{package.name} {package.version} cannot be fetched ({_first_error(complaint)})",
            "check the network; if the archive no longer has this version, "
            "`pyluo vm kernel build --update` "
            "chooses another version",
        )


def _list_versions(name: str, suites: tuple[str, ...]) -> Iterable[SourcePackage]:
    for paragraph in _apt("apt-cache", "show", "--all-versions", name).split("\n\n"):
        fields = dict(re.findall(r"^(\w+): (.*)$", paragraph, re.MULTILINE))
        if "SHA256" in fields:
            yield SourcePackage(name, fields["Version"], fields["SHA256"], suites)


def _compare(one: SourcePackage, other: SourcePackage) -> int:
    if one.series != other.series:
        return 1 if one.series > other.series else -1
    if one.version == other.version:
        return 0
    command = [_program("dpkg"), "--compare-versions", one.version, "gt", other.version]
    newer = subprocess.run(command)
    return 1 if newer.returncode == 0 else -1


def _update_lists(suite: str) -> bool:
    """Update the package lists of a suite, and return whether the suite can be read."""
    _write_sources([suite])
    # Without List-Cleanup=0, apt would remove the lists of the other suites.
    command = [*_command("apt-get"), "-o", "APT::Get::List-Cleanup=0", "update"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment()
    )
    if done.returncode == 0 and not re.search(r"^(E|W: Failed)", done.stderr, re.MULTILINE):
        return True
    progress.say(f"leaving out the suite {suite}: {_first_error(done.stderr)}")
    return False


def _first_error(complaint: str) -> str:
    lines = [line for line in complaint.splitlines() if line.startswith(("E:", "W: Failed"))]
    return lines[0][2:].strip() if lines else complaint.strip() or "no reason given"


def _write_sources(suites: Sequence[str]) -> None:
    mirror = _find_mirror()
    lines = [f"deb [signed-by={_find_keyring()}] {mirror} {suite} main\n" for suite in suites]
    for folder in ("lists/partial", "archives/partial", "packages"):
        (_folder() / folder).mkdir(parents=True, exist_ok=True)
    cache.write(_folder() / "sources.list", "".join(lines))


def _find_keyring() -> Path:
    for suffix in _KEYRING_SUFFIXES:
        path = Path(f"/usr/share/keyrings/debian-archive-keyring.{suffix}")
        if path.exists():
            return path
    raise HarnessError(
        "Debian's keyring is not installed", "install it: apt install debian-archive-keyring"
    )


def _find_mirror() -> str:
    """Return the URI of the Debian archive that the system's own apt uses.

    Archives of security updates and of third parties do not count. PYLUO_DEBIAN_MIRROR takes
    precedence.

    Raises:
        HarnessError: the system's apt uses no Debian archive.
    """
    if forced := os.environ.get(_MIRROR):
        return forced
    pattern = "$(REPO_URI) $(RELEASE) $(ORIGIN)"
    command = [_program("apt-get"), "indextargets", "--format", pattern, "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True, env=_environment())
    targets = listed.stdout.split("\n")
    fields = [target.split() for target in targets if target]
    for uri, release, *origin in fields:
        is_main = "/" not in release and not release.endswith("-security")
        if is_main and origin[:1] in ([], ["Debian"]):
            return uri
    raise HarnessError(
        "the system's apt uses no Debian archive", f"set {_MIRROR} to the address of one"
    )


def _apt(program: str, *arguments: str) -> str:
    command = [*_command(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise HarnessError(f"{program} failed ({_first_error(done.stderr)})")
    return done.stdout


def _environment() -> dict[str, str]:
    """Return the environment for apt: its messages must not be translated, as they are parsed."""
    return {**os.environ, "LC_ALL": "C"}


def _command(program: str) -> list[str]:
    folder = _folder()
    options = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::Etc::Preferences": "-",
        "Dir::Etc::PreferencesParts": "-",
        "Dir::State": folder,
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder,
        "Dir::Cache::Archives": folder / "archives",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "APT::Update::Error-Mode": "any",
        # Without this, apt would switch to the user _apt if it is run by root; the folder belongs
        # to the user who runs this process.
        "APT::Sandbox::User": "root",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return [_program(program), *words]


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HarnessError(
            f"{name} is not installed",
            "kernels are downloaded by apt; on other systems, give the path of a bzImage",
        )
    return path


def _folder() -> Path:
    return cache.folder() / "apt"
