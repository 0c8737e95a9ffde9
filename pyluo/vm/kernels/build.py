"""Configure and build kernels, and keep them in the cache.

The name of a kernel's folder in the cache is a digest of the source, the configuration and the
compiler.
"""

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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyluo.vm import cache, progress
from pyluo.vm.cores import usable_cores
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import objects
from pyluo.vm.kernels.files import CONFIG, HEADERS, IMAGE, SIGNING_KEY, SYSTEM_MAP, VMLINUX
from pyluo.vm.kernels.kconfig import Fragment, Setting, find_unmet, merge
from pyluo.vm.packages import how_to_install

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyluo.vm.kernels.source import FileState, Source

__all__ = ["NEEDED_SPACE", "build", "missing_packages", "run_step", "toolchain"]

NEEDED_SPACE = 3 << 30
"""How many bytes a build needs: 1.8 GB for the source, 0.4 GB for objects, and some to spare."""

_USUAL_COUNT = 2000  # about how many objects a full build compiles
_COMPILED = re.compile(r"  (CC|AS|HOSTCC) ")
_TOOLS = {
    "gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "lz4": "lz4",
    "xz": "xz-utils", "rsync": "rsync", "perl": "perl",
}  # fmt: skip
# Seconds after which an unused kernel that was built from a tree is removed, because each edit of a
# tree adds another kernel to the cache.
_UNUSED_LIMIT = 7 * 24 * 3600
_LIBELF = Path("/usr/include/gelf.h")
_LIBSSL = Path("/usr/include/openssl/evp.h")
_SIGNING = "CONFIG_MODULE_SIG"  # with this, a build makes a key and needs OpenSSL for it
# A build inherits only these environment variables. From others, make and Kconfig would take
# settings that are not in the digest that names the kernel.
_INHERITED = ("PATH", "HOME", "TMPDIR")
_FIXED = {
    "LC_ALL": "C",
    "KBUILD_BUILD_USER": "pyluo",
    "KBUILD_BUILD_HOST": "pyluo",
    "KBUILD_BUILD_VERSION": "1",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01 00:00:00 UTC",
}


def build(source: Source, fragments: Sequence[Fragment]) -> Path:
    """Return the folder of a built kernel, and build the kernel first unless the cache has it.

    Only one build runs at a time; other processes wait, and then look in the cache again. What an
    interrupted build leaves is never mistaken for a kernel.

    Args:
        source: the kernel's source.
        fragments: the Kconfig fragments, in the order in which they are merged.

    Raises:
        HarnessError: a tool or the source is missing, the disk is full, or the build failed.
    """
    kernels = cache.folder() / "kernels"
    if re.search(r"[\s:]", os.fspath(kernels)):
        raise HarnessError(
            f"a kernel cannot be built in {kernels}",
            "make(1) takes no path with a space or a colon: set XDG_CACHE_HOME to another folder",
        )
    if shutil.which("gcc") is None or shutil.which("ld") is None:
        _check_tools(fragments)  # check now, because `_key` runs them
    target = kernels / _key(source, fragments)
    if _use_cached(target):
        return target
    _check_tools(fragments)
    waiting = "waiting for another build of a kernel to end"
    with cache.lock("build", lambda: progress.say(waiting)):
        # In this order: what changes after the scan is noticed at the end. The source may have
        # changed while this process waited for the lock.
        state = source.scan()
        target = kernels / _key(source, fragments)
        if _use_cached(target):
            return target
        _check_space(kernels)
        _remove_leftovers(kernels)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=kernels) as scratch:
            result = _Build(source, tuple(fragments), Path(scratch), state).run()
            is_packed = source.home is None
            if source.scan() != state or (
                is_packed and kernels / _key(source, fragments) != target
            ):
                raise HarnessError(
                    f"{source.description} changed while it was built", "build it again"
                )
            result.rename(target)
    return target


def run_step(what: str, command: list[str]) -> list[str]:
    """Run a program in the environment of a build, and return the lines of its output.

    Args:
        what: the name of the work, for the error message.
        command: the program and its arguments.

    Raises:
        HarnessError: the program failed.
    """
    with _Process(command) as process:
        output = list(process.read_lines())
    if process.status:
        raise HarnessError(f"{what} failed", "\n" + "\n".join(output[-30:]))
    return output


def toolchain() -> list[str]:
    """Return the names and versions of the compiler and of the linker."""
    commands = [["gcc", "--version"], ["ld", "--version"]]
    done = [subprocess.run(each, capture_output=True, text=True, check=True) for each in commands]
    return [each.stdout.partition("\n")[0] for each in done]


class _Build:
    """A build of a kernel.

    Args:
        source: the kernel's source.
        fragments: the Kconfig fragments, in the order in which they are merged.
        scratch: the folder for the result and for an unpacked source; the caller removes it.
        state: the files of the tree, if the source is a tree.
    """

    def __init__(
        self,
        source: Source,
        fragments: tuple[Fragment, ...],
        scratch: Path,
        state: dict[str, FileState],
    ) -> None:
        self._source = source
        self._fragments = fragments
        self._state = state
        self._objects = scratch / "objects"
        if source.home is not None:
            self._objects = objects.find(source.home, _digest(os.fspath(source.home), fragments))
        self._result = scratch / "result"
        self._unpacked = scratch / "source"
        for folder in (self._objects, self._result, self._unpacked):
            folder.mkdir(exist_ok=True)
        self._tree = self._unpacked

    def run(self) -> Path:
        progress.say(f"building {self._source.description}; the cache keeps it")
        with progress.bar("unpacking", None):
            self._tree = self._source.unpack(self._unpacked)
        with objects.recorded(self._objects, self._state):
            from_scratch = not (self._objects / ".config").exists()
            self._configure()
            count = self._compile(_read_object_count() if from_scratch else None)
            self._make("headers_install", f"INSTALL_HDR_PATH={self._result / HEADERS}")
        self._collect()
        if from_scratch:
            cache.write(_object_count_file(), json.dumps(count))
        return self._result

    def _configure(self) -> None:
        """Write the configuration, and check that it has all settings of the fragments.

        As to Kconfig, a later fragment has the last word: a setting of an earlier one may get lost
        because of it, for instance if both choose from the same choice.

        Raises:
            HarnessError: the configuration lost a setting, and no later fragment is the reason.
        """
        for fragment in self._fragments:
            if modules := fragment.modules():
                names = ", ".join(modules)
                progress.say(f"{names} ({fragment.name}): y instead of m, guests load no modules")
        lost = self._try_fragments(self._fragments)
        overridden = []
        for number in range(1, len(self._fragments)) if lost else ():
            wanted = merge(self._fragments[:number])
            own = self._try_fragments(self._fragments[:number])
            overridden += [
                each
                for each in lost
                if each in wanted and each not in own and each not in overridden
            ]
        if overridden:
            self._try_fragments(self._fragments)
            names = ", ".join(map(str, overridden))
            progress.say(f"{names}: no longer so, because of a later fragment")
        if lost := [each for each in lost if each not in overridden]:
            raise HarnessError(
                f"the configuration lost {', '.join(map(str, lost))}",
                "a dependency of each option is missing, or its name changed: correct the fragment",
            )

    def _try_fragments(self, fragments: tuple[Fragment, ...]) -> list[Setting]:
        """Configure the kernel with these fragments, and return the settings that got lost."""
        self._make("tinyconfig")
        # Append, because Kconfig uses the last of several lines that set an option.
        with (self._objects / ".config").open("a", errors="surrogateescape") as config:
            config.writelines(f"{each.line}\n" for each in merge(fragments))
        self._make("olddefconfig")
        return find_unmet(self._objects / ".config", fragments)

    def _compile(self, expected: int | None) -> int:
        """Compile the kernel, and return how many objects were compiled."""
        count = 0
        tail: list[str] = []
        command = self._command(f"-j{usable_cores()}", "bzImage", "vmlinux")
        with progress.bar("compiling", expected) as move_bar, _Process(command) as process:
            for line in process.read_lines():
                tail = [*tail[-30:], line]
                if _COMPILED.match(line):
                    count += 1
                    move_bar(count)
        if process.status:
            raise HarnessError("the kernel does not compile", "\n" + "\n".join(tail))
        return count

    def _collect(self) -> None:
        for file, name in (
            ("arch/x86/boot/bzImage", IMAGE),
            (".config", CONFIG),
            ("System.map", SYSTEM_MAP),
            ("vmlinux", VMLINUX),
        ):
            shutil.copyfile(self._objects / file, self._result / name)
        # Only with CONFIG_MODULE_SIG does a build make a key.
        if (key := self._objects / "certs" / SIGNING_KEY).exists():
            shutil.copyfile(key, self._result / SIGNING_KEY)
        if self._source.home is not None:
            cache.write(self._result / objects.TREE, os.fspath(self._source.home))

    def _make(self, *words: str) -> None:
        run_step(f"make {words[0]}", self._command(*words))

    def _command(self, *words: str) -> list[str]:
        tree, objects = os.fspath(self._tree), os.fspath(self._objects)
        # If LOCALVERSION is empty and not unset, Kbuild does not add "+" to the release of a
        # checkout that is not at a tag.
        return ["make", "-C", tree, f"O={objects}", "LOCALVERSION=", *words]


class _Process:
    """A running program, used in a `with` block.

    If the block raises an exception, the program and all that it has started are killed.

    Attributes:
        status: the exit status, after the block.
    """

    def __init__(self, command: list[str]) -> None:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self._process = subprocess.Popen(
            # If this process is killed, make must not run on: the next build may write to the same
            # objects.
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

    def read_lines(self) -> Iterator[str]:
        """Yield the program's output, a line at a time."""
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
    """Return the kernel's name in the cache: a digest of its source, fragments and compiler."""
    return _digest(source.identity, fragments)


def _digest(source: str, fragments: Sequence[Fragment]) -> str:
    settings = {each.option: each.value for each in merge(fragments)}
    parts = [source, settings, toolchain()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _check_tools(fragments: Sequence[Fragment]) -> None:
    if missing := missing_packages(fragments):
        raise HarnessError(f"building a kernel needs {' '.join(missing)}", how_to_install(missing))


def missing_packages(fragments: Sequence[Fragment] = ()) -> list[str]:
    """Return what Debian calls the packages that building a kernel needs, and that are missing."""
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if not _LIBELF.exists():
        missing.append("libelf-dev")
    if any(each.option == _SIGNING and each.value == "y" for each in merge(fragments)):
        missing += ["openssl"] if shutil.which("openssl") is None else []
        missing += ["libssl-dev"] if not _LIBSSL.exists() else []
    return missing


def _check_space(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED_SPACE:
        raise HarnessError(
            f"{folder} has {free / 1e9:.1f} GB of free space, and a build needs "
            f"{NEEDED_SPACE / 1e9:.1f} GB",
            "free some space, or set XDG_CACHE_HOME to a folder that has enough",
        )


def _use_cached(kernel: Path) -> bool:
    """Return whether the cache has a kernel, and set the modification time of its folder to now.

    `_remove_leftovers` takes the modification time for the time of the last use.
    """
    with suppress(OSError):  # the folder does not exist, or belongs to another user
        os.utime(kernel)
    return kernel.exists()


def _remove_leftovers(kernels: Path) -> None:
    """Remove what killed builds have left, and kernels of trees that were not used for a week.

    The caller must hold the lock.
    """
    for tree in kernels.glob(f"*/{objects.TREE}"):
        if tree.parent.stat().st_mtime < time.time() - _UNUSED_LIMIT:
            # Rename the folder first, so that no other run finds a kernel that is half removed.
            tree.parent.rename(kernels / f".building-{tree.parent.name}")
    for leftover in kernels.glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _object_count_file() -> Path:
    return cache.folder() / "objects.json"


def _read_object_count() -> int:
    """Return how many objects the last full build compiled."""
    try:
        return int(json.loads(_object_count_file().read_text()))
    except (OSError, ValueError):
        return _USUAL_COUNT
