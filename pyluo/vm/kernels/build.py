"""Builds kernels into the cache: configured, checked, and found again by what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyluo.vm import progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import cache
from pyluo.vm.kernels.kconfig import Fragment, unmet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyluo.vm.kernels.source import Source

__all__ = ["CONFIG", "HEADERS", "IMAGE", "SYSTEM_MAP", "VMLINUX", "build", "compiler", "run_step"]

IMAGE, CONFIG, SYSTEM_MAP, VMLINUX, HEADERS = (
    "bzImage", "config", "System.map", "vmlinux", "headers"
)  # fmt: skip

_ROOM = 3 << 30  # bytes: 1.8 GB of source, 0.4 GB of objects, and some to spare
_OBJECTS = 2000  # how many a first build makes, about
_OBJECT = re.compile(r"  (CC|AS|HOSTCC) ")
_TOOLS = {
    "gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "lz4": "lz4",
    "xz": "xz-utils", "rsync": "rsync", "perl": "perl",
}  # fmt: skip
_UNDER_WAY = ".under-way"
_TREE = "tree"  # in a folder of the cache: the path of the tree that it is for
_UNUSED = 7 * 24 * 3600  # seconds after which a tree's kernel goes: each edit and commit makes one
_LIBELF = Path("/usr/include/gelf.h")
# A build sees this of the environment and no more: what else make and Kconfig would take from it
# is not in the kernel's key.
_KEPT = ("PATH", "HOME", "TMPDIR")
_FIXED = {
    "LC_ALL": "C",
    "KBUILD_BUILD_USER": "pyluo",
    "KBUILD_BUILD_HOST": "pyluo",
    "KBUILD_BUILD_VERSION": "1",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01 00:00:00 UTC",
}


def build(source: Source, fragments: Sequence[Fragment]) -> Path:
    """The folder of the built kernel; built now, unless the cache has it.

    Only one build runs at a time; others wait for it, and then look in the cache again. What an
    interrupted build leaves is never taken for a kernel.

    Raises:
        HarnessError: a tool, room on the disk or the source is missing, or the build failed.
    """
    kernels = cache.folder() / "kernels"
    if re.search(r"[\s:]", os.fspath(kernels)):
        raise HarnessError(
            f"a kernel cannot be built in {kernels}",
            "make(1) takes no path with a space or a colon: set XDG_CACHE_HOME to another",
        )
    if shutil.which("gcc") is None:
        _check_tools()  # even the key needs the compiler
    target = kernels / _key(source, fragments)
    if _is_there(target):
        return target
    _check_tools()
    waiting = "waiting for another build of a kernel to end"
    with cache.lock("build", lambda: progress.say(waiting)):
        if _is_there(target):
            return target
        _check_room(kernels)
        _sweep(kernels)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=kernels) as scratch:
            objects = _kept_objects(source, fragments) or Path(scratch, "objects")
            done = _Build(source, tuple(fragments), Path(scratch), objects).run()
            if kernels / _key(source, fragments) != target:
                raise HarnessError(
                    f"{source.description} changed while it was built", "build it again"
                )
            done.rename(target)
    return target


def run_step(what: str, command: list[str]) -> list[str]:
    """Runs a program in the environment that kernels are built in, and returns the lines it said.

    Args:
        what: the name of the work.
        command: the program and its arguments.

    Raises:
        HarnessError: it failed.
    """
    with _Process(command) as process:
        said = list(process.lines())
    if process.status:
        raise HarnessError(f"{what} failed", "\n" + "\n".join(said[-30:]))
    return said


def compiler() -> str:
    """What the C compiler calls itself."""
    done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0]


class _Build:
    """One build, in a scratch folder that is removed afterwards; the objects may lie elsewhere."""

    def __init__(
        self, source: Source, fragments: tuple[Fragment, ...], scratch: Path, objects: Path
    ) -> None:
        self._source = source
        self._fragments = fragments
        self._objects = objects
        self._result = scratch / "result"
        self._unpacked = scratch / "source"
        for folder in (self._objects, self._result, self._unpacked):
            folder.mkdir(exist_ok=True)
        self._tree = self._unpacked

    def run(self) -> Path:
        progress.say(f"building {self._source.description}; the cache keeps it")
        with progress.bar("unpacking", None):
            self._tree = self._source.unpack(self._unpacked)
        whole = not (self._objects / ".config").exists()
        with _under_way(self._objects):
            self._configure()
            made = self._compile(_expected() if whole else None)
        self._collect()
        if whole:
            cache.write(_memory(), json.dumps(made))
        return self._result

    def _configure(self) -> None:
        self._make("tinyconfig")
        for fragment in self._fragments:
            # Kconfig takes the last of several lines for one option.
            with (self._objects / ".config").open("a") as config:
                config.write(fragment.text)
        self._make("olddefconfig")
        lost = unmet(self._objects / ".config", self._fragments)
        if lost:
            raise HarnessError(
                f"the configuration lost {', '.join(map(str, lost))}",
                "a dependency of each is missing, or its name changed: mend the fragment",
            )

    def _compile(self, expected: int | None) -> int:
        """Compiles, and returns how many objects that made."""
        made = 0
        tail: list[str] = []
        command = self._command(f"-j{os.cpu_count() or 1}", "bzImage", "vmlinux")
        with progress.bar("compiling", expected) as reached, _Process(command) as process:
            for line in process.lines():
                tail = [*tail[-30:], line]
                if _OBJECT.match(line):
                    made += 1
                    reached(made)
        if process.status:
            raise HarnessError("the kernel does not compile", "\n" + "\n".join(tail))
        return made

    def _collect(self) -> None:
        self._make("headers_install", f"INSTALL_HDR_PATH={self._result / HEADERS}")
        for file, name in (
            ("arch/x86/boot/bzImage", IMAGE),
            (".config", CONFIG),
            ("System.map", SYSTEM_MAP),
            ("vmlinux", VMLINUX),
        ):
            shutil.copyfile(self._objects / file, self._result / name)
        if self._source.home is not None:
            cache.write(self._result / _TREE, os.fspath(self._source.home))

    def _make(self, *words: str) -> None:
        run_step(f"make {words[0]}", self._command(*words))

    def _command(self, *words: str) -> list[str]:
        tree, objects = os.fspath(self._tree), os.fspath(self._objects)
        # An empty LOCALVERSION keeps the "+" of an untagged checkout out of the release.
        return ["make", "-C", tree, f"O={objects}", "LOCALVERSION=", *words]


class _Process:
    """A program and all it starts, which end with the block, however that ends."""

    def __init__(self, command: list[str]) -> None:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        self._process = subprocess.Popen(
            # Where this process is killed, the objects that make writes may soon be another's.
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            env=environment | _FIXED,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.status = 0

    def lines(self) -> Iterator[str]:
        """What it says, a line at a time."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.rstrip("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self.status = self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _key(source: Source, fragments: Sequence[Fragment]) -> str:
    """The name of the kernel in the cache: a digest of all that it is made of."""
    return _digest(source.identity, fragments)


def _kept_objects(source: Source, fragments: Sequence[Fragment]) -> Path | None:
    """Where the objects of a tree are kept from build to build; None for what is no tree.

    Those of trees that are gone are removed, and those that a build was killed over; the caller
    holds the lock.
    """
    if source.home is None:
        return None
    kept = cache.folder() / "objects"
    for tree in kept.glob(f"*/{_TREE}"):
        if not Path(tree.read_text()).exists():
            shutil.rmtree(tree.parent)
    folder = kept / _digest(os.fspath(source.home), fragments)
    if (folder / _UNDER_WAY).exists():
        shutil.rmtree(folder)
    cache.write(folder / _TREE, os.fspath(source.home))
    return folder


@contextmanager
def _under_way(objects: Path) -> Iterator[None]:
    """Marks objects that a killed build would leave in doubt: make takes for finished what a
    compiler, or objtool after it, was cut short in. One that fails by itself removes that."""
    mark = objects / _UNDER_WAY
    mark.touch()
    try:
        yield
    except HarnessError:
        mark.unlink()
        raise
    mark.unlink()


def _digest(source: str, fragments: Sequence[Fragment]) -> str:
    ingredients = [source, [(each.name, each.text) for each in fragments], compiler()]
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:32]


def _check_tools() -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if not _LIBELF.exists():
        missing.append("libelf-dev")
    if missing:
        names = " ".join(missing)
        raise HarnessError(f"to build a kernel, {names} must be there", f"apt install {names}")


def _check_room(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise HarnessError(
            f"{folder} has {free / 1e9:.1f} GB of room, and a build needs {_ROOM / 1e9:.1f} GB",
            "free some, or set XDG_CACHE_HOME to a folder that has it",
        )


def _is_there(kernel: Path) -> bool:
    """Whether the cache has it; it is used now, says its folder's time from here on."""
    with suppress(OSError):  # not there, or a cache that is somebody else's
        os.utime(kernel)
    return kernel.exists()


def _sweep(kernels: Path) -> None:
    """Removes what killed builds left, and the kernels of trees that nobody has asked for in a
    while; the caller holds the lock."""
    for tree in kernels.glob(f"*/{_TREE}"):
        if tree.parent.stat().st_mtime < time.time() - _UNUSED:
            # In one step: nobody is to find a part of it.
            tree.parent.rename(kernels / f".building-{tree.parent.name}")
    for leftover in kernels.glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _memory() -> Path:
    return cache.folder() / "objects.json"


def _expected() -> int:
    """How many objects the last build made."""
    try:
        return int(json.loads(_memory().read_text()))
    except (OSError, ValueError):
        return _OBJECTS
