"""Where a kernel's source comes from: Debian's archive, a tarball, or a tree being worked in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import cache, debian
from pyluo.vm.kernels.catalogue import KernelSpec, Series, suites
from pyluo.vm.kernels.debian import SourcePackage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["ArchiveSource", "Source", "Tarball", "Tree", "choose"]

_BUILT_IN_PLACE = (".config", "include/config", "arch/x86/include/generated")  # as Makefile has it


class Source(Protocol):
    """A kernel's source."""

    @property
    def description(self) -> str:
        """What it is, in a few words."""

    @property
    def identity(self) -> str:
        """A string that changes with the content."""

    @property
    def home(self) -> Path | None:
        """Where it stays: then what one build of it compiled, the next need not. None if it is
        unpacked for each build."""

    def unpack(self, folder: Path) -> Path:
        """The tree: in `folder`, or where it already is."""

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Copies a part of the tree into `folder`, for a build that may write there.

        Args:
            patterns: of paths in the tree, as a shell has them; a folder stands for all in it.
            folder: which takes the place of the tree's top.

        Raises:
            HarnessError: a pattern fits nothing.
        """


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """A package of Debian's archive."""

    package: SourcePackage

    @property
    def description(self) -> str:
        """The kernel's version and the package's."""
        return f"Linux {self.package.upstream} ({self.package.name} {self.package.version})"

    @property
    def identity(self) -> str:
        """The checksum that the archive signed."""
        return self.package.sha256

    @property
    def home(self) -> Path | None:
        """Nowhere."""
        return None

    def unpack(self, folder: Path) -> Path:
        """Fetches the package if need be, and unpacks the tarball within."""
        self._untar(folder)
        return folder

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Likewise, but a part of it."""
        self._untar(folder, *_members(patterns))

    def _untar(self, folder: Path, *members: str) -> None:
        deb = debian.fetch(self.package)
        inner = f"./usr/src/{self.package.name}.tar.xz"
        _pipe(
            ["dpkg-deb", "--fsys-tarfile", os.fspath(deb)],
            ["tar", "--extract", "--to-stdout", inner],
            ["tar", "--extract", "--xz", "--strip-components=1", f"--directory={folder}", *members],
        )


@dataclass(frozen=True, slots=True)
class Tarball:
    """A tar file with a kernel tree in its one top folder."""

    path: Path

    @property
    def description(self) -> str:
        """Its name."""
        return self.path.name

    @property
    def identity(self) -> str:
        """The checksum of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def home(self) -> Path | None:
        """Nowhere."""
        return None

    def unpack(self, folder: Path) -> Path:
        """Unpacks it."""
        self._untar(folder)
        return folder

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Unpacks a part of it."""
        self._untar(folder, *_members(patterns))

    def _untar(self, folder: Path, *members: str) -> None:
        _pipe(
            [
                "tar",
                "--extract",
                "--strip-components=1",
                f"--file={self.path}",
                f"--directory={folder}",
                *members,
            ]
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """A kernel tree, dirty or not; it is built out of tree and never written to."""

    path: Path

    @property
    def description(self) -> str:
        """Its path."""
        return f"the tree {self.path}"

    @property
    def identity(self) -> str:
        """For a git checkout the commit's tree, the changes and the new files; else the names,
        sizes and times of all files."""
        if (self.path / ".git").exists():
            return self._git_identity()
        digest = hashlib.sha256()
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            for name in sorted(files):
                stat = os.lstat(os.path.join(folder, name))
                digest.update(f"{folder}/{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def home(self) -> Path | None:
        """Its path, whatever it holds at the time."""
        return self.path.resolve()

    def unpack(self, folder: Path) -> Path:
        """Where it is.

        Raises:
            HarnessError: it has been built in its own folder, which make(1) lets nobody build out
                of.
        """
        for trace in _BUILT_IN_PLACE:
            if (self.path / trace).exists():
                raise HarnessError(
                    f"{self.description} has been built in its own folder ({trace} is there)",
                    "run `make mrproper` in it, which removes its .config as well, or name a "
                    "worktree: git worktree add",
                )
        return self.path

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Copies what fits, but for the objects of an earlier build, which make would trust."""
        for pattern in patterns:
            found = list(self.path.glob(pattern))
            if not found:
                raise HarnessError(f"{self.description} has no {pattern}")
            for path in found:
                target = folder / path.relative_to(self.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    objects = shutil.ignore_patterns("*.o", "*.d")
                    shutil.copytree(path, target, symlinks=True, ignore=objects, dirs_exist_ok=True)
                else:
                    shutil.copy2(path, target)

    def _git_identity(self) -> str:
        digest = hashlib.sha256()
        digest.update(self._git("rev-parse", "HEAD^{tree}"))
        digest.update(self._git("diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD"))
        new = self._git("ls-files", "--others", "--exclude-standard", "-z")
        for name in filter(None, new.split(b"\0")):
            content = _content(self.path / os.fsdecode(name))
            digest.update(b"%s\0%d\0%s" % (name, len(content), content))
        return digest.hexdigest()

    def _git(self, *arguments: str) -> bytes:
        command = ["git", "-C", os.fspath(self.path), *arguments]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            raise HarnessError(f"git cannot read {self.path} ({done.stderr.decode().strip()})")
        return done.stdout


def _content(file: Path) -> bytes:
    """What a new path of a tree holds: a file, a link, or a repository of its own."""
    try:
        if file.is_symlink():
            return os.fsencode(os.readlink(file))
        return Tree(file).identity.encode() if file.is_dir() else file.read_bytes()
    except OSError as error:
        raise HarnessError(f"{file} cannot be read ({error.strerror})") from None


def choose(spec: KernelSpec, *, update: bool) -> ArchiveSource:
    """The package that a rule of kernels.toml stands for.

    What the archive had is remembered, so that a run is repeatable and needs no network, and that
    all rules which look in the same suites are applied to one state of them.

    Args:
        spec: the kernel.
        update: ask the archive again, even if its state is remembered.

    Raises:
        HarnessError: the archive cannot be read, or has nothing that fits.
    """
    wanted = suites(spec.candidates)
    memory = cache.folder() / f"archive-{'-'.join(wanted)}.json"
    packages = None if update else _remembered(memory)
    if packages is None:
        packages = debian.newest_first(wanted, candidates=spec.candidates)
        cache.write(memory, json.dumps([asdict(package) for package in packages]))
    return ArchiveSource(_apply(spec, packages))


def _remembered(memory: Path) -> list[SourcePackage] | None:
    try:
        known = json.loads(memory.read_text())
        return [SourcePackage(**{**each, "suites": tuple(each["suites"])}) for each in known]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # never written, or damaged: the archive knows better


def _apply(spec: KernelSpec, packages: list[SourcePackage]) -> SourcePackage:
    newest = packages[0]
    if spec.series is Series.NEWEST:
        return newest
    older = [package for package in packages if package.series < newest.series]
    if not older:
        raise HarnessError(f"the archive has no kernel series before {newest.name}")
    return older[0]


def _members(patterns: Sequence[str]) -> list[str]:
    """The words that make tar extract only what fits, below the archive's one top folder."""
    return ["--wildcards", "--no-wildcards-match-slash", *(f"*/{each}" for each in patterns)]


def _pipe(*commands: list[str]) -> None:
    """Runs programs with each one's output as the next one's input."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            stdin = processes[-1].stdout if processes else subprocess.DEVNULL
            last = command is commands[-1]
            stdout = subprocess.DEVNULL if last else subprocess.PIPE
            process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
            processes.append(process)
        for process in processes[:-1]:
            assert process.stdout is not None
            process.stdout.close()
        complaints = [process.communicate()[1].decode().strip() for process in reversed(processes)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise HarnessError(f"the kernel source cannot be unpacked ({' '.join(complaints).strip()})")
