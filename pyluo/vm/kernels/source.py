"""The source of a kernel: a package of Debian's archive, a tarball, or a kernel tree."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pyluo.vm import cache
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import debian
from pyluo.vm.kernels.catalogue import KernelSpec, Series, suites
from pyluo.vm.kernels.debian import SourcePackage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["ArchiveSource", "FileState", "Source", "Tarball", "Tree", "choose"]

# If one of these paths exists, the tree was built in its own folder. The kernel's Makefile checks
# the same paths.
_BUILT_IN_PLACE = (".config", "include/config", "arch/x86/include/generated")


# Names that kbuild gives no meaning to: editors and version control create and change such files
# while a kernel is built.
_NO_INPUT = re.compile(r"\..*|.*~|.*\.(?:orig|rej|swp)|tags|TAGS|cscope\..*|G(?:PATH|RTAGS|TAGS)")
# git compares files with its index by their times. These settings could make it miss a change.
_GIT_SETTINGS = (
    "core.trustctime=true", "core.checkStat=default", "core.ignoreStat=false",
    "core.fsmonitor=false", "core.untrackedCache=false",
)  # fmt: skip
# git must find the repository by the folder, not by variables that were set for another one (git
# sets some of them for its hooks).
_GIT_KEPT = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")


class FileState(NamedTuple):
    """What of a file's inode changes if the file is written to, or replaced.

    Attributes:
        modified: the modification time, in nanoseconds.
        changed: the time of the last change of the inode, in nanoseconds.
        size: bytes.
        inode: the number of the inode.
        device: the number of the file system.
    """

    modified: int
    changed: int
    size: int
    inode: int
    device: int


class Source(Protocol):
    """The source of a kernel."""

    @property
    def description(self) -> str:
        """The source in a few words, for messages."""

    @property
    def identity(self) -> str:
        """A string that is different if the content of the source is different."""

    @property
    def home(self) -> Path | None:
        """The folder of a kernel tree; None if the source is unpacked for each build.

        If there is such a folder, a build can reuse the objects of the build before.
        """

    def scan(self) -> dict[str, FileState]:
        """Return the paths and states of the files in the tree; none if the source is packed."""

    def unpack(self, folder: Path) -> Path:
        """Return the folder of the kernel tree: the source's own, or `folder` after unpacking.

        Args:
            folder: the folder to unpack the source to, if it is packed.
        """

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Copy a part of the kernel tree, for a build that writes to the copy.

        Args:
            patterns: shell patterns of paths in the tree; a folder stands for all files in it.
            folder: the folder that becomes the top of the copied tree.

        Raises:
            HarnessError: a pattern matches nothing.
        """


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """The source of a kernel in a package of Debian's archive."""

    package: SourcePackage

    @property
    def description(self) -> str:
        """The versions of the kernel and of the package."""
        return f"Linux {self.package.upstream} ({self.package.name} {self.package.version})"

    @property
    def identity(self) -> str:
        """The checksum of the .deb file, from the archive's signed index."""
        return self.package.sha256

    @property
    def home(self) -> Path | None:
        """Nowhere."""
        return None

    def scan(self) -> dict[str, FileState]:
        """Return nothing."""
        return {}

    def unpack(self, folder: Path) -> Path:
        """Unpack the tarball in the package; download the package unless the cache has it."""
        self._untar(folder)
        return folder

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Unpack a part of the tarball in the package."""
        self._untar(folder, *_member_options(patterns))

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
    """A tar file that contains a kernel tree in its only top folder."""

    path: Path

    @property
    def description(self) -> str:
        """The name of the file."""
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

    def scan(self) -> dict[str, FileState]:
        """Return nothing."""
        return {}

    def unpack(self, folder: Path) -> Path:
        """Unpack the tarball."""
        self._untar(folder)
        return folder

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Unpack a part of the tarball."""
        self._untar(folder, *_member_options(patterns))

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
    """A kernel tree in a folder, with or without uncommitted changes; builds never write to it."""

    path: Path

    @property
    def description(self) -> str:
        """The path of the tree."""
        return f"the tree {self.path}"

    @property
    def identity(self) -> str:
        """A digest of the content of the tree.

        In a git checkout it covers the commit's tree, the uncommitted changes and the untracked
        files, and the states of files that git was told to ignore; in another folder, the states of
        all files. Hidden files and backups of editors do not count.
        """
        if (self.path / ".git").exists():
            return self._git_identity()
        return _digest(self.scan())

    @property
    def home(self) -> Path | None:
        """The path of the tree."""
        return self.path.resolve()

    def scan(self) -> dict[str, FileState]:
        """Return the paths and states of all files that could be a part of the kernel."""
        found = {}
        folders = [os.fspath(self.path)]
        start = len(folders[0]) + 1
        try:
            while folders:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if _NO_INPUT.fullmatch(entry.name):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                            continue
                        stat = entry.stat(follow_symlinks=False)
                        if entry.is_symlink() and entry.is_file():  # its content counts
                            stat = entry.stat()
                        found[entry.path[start:]] = FileState(
                            stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino,
                            stat.st_dev,
                        )  # fmt: skip
        except OSError as error:
            raise HarnessError(f"{error.filename} cannot be read ({error.strerror})") from None
        return found

    def unpack(self, folder: Path) -> Path:
        """Return the path of the tree.

        Raises:
            HarnessError: the tree has been built in its own folder, so that its Makefile refuses to
                put objects into another folder.
        """
        for product in _BUILT_IN_PLACE:
            if (self.path / product).exists():
                raise HarnessError(
                    f"{self.description} has been built in its own folder ({product} exists)",
                    "run `make mrproper` in it, which removes its .config as well, or name a "
                    "worktree: git worktree add",
                )
        return self.path

    def extract(self, patterns: Sequence[str], folder: Path) -> None:
        """Copy a part of the tree, without objects of an earlier build, which make would reuse."""
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
        new = self._list("--others", "--exclude-standard")
        for name in new:
            content = _read_new_file(self.path / name)
            digest.update(b"%s\0%d\0%s" % (os.fsencode(name), len(content), content))
        tagged = [(line[0], line[2:]) for line in self._list("-v")]
        # A small letter or an S: git was told not to look at this file.
        seen = {name for tag, name in tagged if tag.isupper() and tag != "S"} | set(new)
        state = self.scan()
        digest.update(_digest({path: state[path] for path in state.keys() - seen}).encode())
        return digest.hexdigest()

    def _list(self, *options: str) -> list[str]:
        output = self._git("ls-files", "-z", *options)
        return [os.fsdecode(name) for name in output.split(b"\0") if name]

    def _git(self, *arguments: str) -> bytes:
        settings = [word for setting in _GIT_SETTINGS for word in ("-c", setting)]
        command = ["git", "-C", os.fspath(self.path), *settings, *arguments]
        foreign = {name for name in os.environ if name.startswith("GIT_")} - set(_GIT_KEPT)
        environment = {name: os.environ[name] for name in os.environ.keys() - foreign}
        done = subprocess.run(command, capture_output=True, env=environment)
        if done.returncode:
            raise HarnessError(f"git cannot read {self.path} ({done.stderr.decode().strip()})")
        return done.stdout


def _digest(states: dict[str, FileState]) -> str:
    return hashlib.sha256(json.dumps(sorted(states.items())).encode()).hexdigest()


def _read_new_file(file: Path) -> bytes:
    """Return the content of an untracked file.

    For a symbolic link this is its target, and for a git repository in the tree its identity.
    """
    try:
        if file.is_symlink():
            return os.fsencode(os.readlink(file))
        return Tree(file).identity.encode() if file.is_dir() else file.read_bytes()
    except OSError as error:
        raise HarnessError(f"{file} cannot be read ({error.strerror})") from None


def choose(spec: KernelSpec, *, update: bool) -> ArchiveSource:
    """Return the package of the archive from which a kernel of kernels.toml is built.

    The list of the archive's packages is saved, so that later runs choose the same package and need
    no network. All kernels from the same suites are chosen from the same list.

    Args:
        spec: the description of the kernel.
        update: whether to ask the archive for its packages even if the list is saved.

    Raises:
        HarnessError: the archive cannot be read, or has no such kernel.
    """
    wanted = suites(spec.candidates)
    file = cache.folder() / f"archive-{'-'.join(wanted)}.json"
    packages = None if update else _read_packages(file)
    if packages is None:
        packages = debian.newest_first(wanted, candidates=spec.candidates)
        cache.write(file, json.dumps([asdict(package) for package in packages]))
    return ArchiveSource(_select_series(spec, packages))


def _read_packages(file: Path) -> list[SourcePackage] | None:
    """Return the packages that `choose` saved; None if there is no such file, or it is damaged."""
    try:
        saved = json.loads(file.read_text())
        return [SourcePackage(**{**each, "suites": tuple(each["suites"])}) for each in saved]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _select_series(spec: KernelSpec, packages: list[SourcePackage]) -> SourcePackage:
    newest = packages[0]
    if spec.series is Series.NEWEST:
        return newest
    older = [package for package in packages if package.series < newest.series]
    if not older:
        raise HarnessError(f"the archive has no kernel series before {newest.name}")
    return older[0]


def _member_options(patterns: Sequence[str]) -> list[str]:
    """Return arguments for tar to extract only paths that match patterns, below the top folder."""
    return ["--wildcards", "--no-wildcards-match-slash", *(f"*/{each}" for each in patterns)]


def _pipe(*commands: list[str]) -> None:
    """Run programs in a pipeline: the output of each one is the input of the next one.

    Raises:
        HarnessError: one of the programs failed.
    """
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
