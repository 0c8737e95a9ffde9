"""A kernel that can be booted."""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels import build
from pyluo.vm.kernels.catalogue import KernelSpec, catalogue
from pyluo.vm.kernels.kconfig import Fragment
from pyluo.vm.kernels.source import Source, Tarball, Tree, choose

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Kernel", "is_image", "settled"]

# What the names of kernels stand for, to the processes of a run: see `settled`.
_SETTLED = "PYLUO_KERNELS"

_TARBALLS = (".tar", ".tar.gz", ".tar.xz", ".tar.zst", ".tar.bz2", ".tgz", ".txz")
# Documentation/arch/x86/boot.rst, the real-mode header.
_MAGIC_AT, _MAGIC, _VERSION_AT, _VERSION_BASE = 0x202, b"HdrS", 0x20E, 0x200


@dataclass(frozen=True, slots=True)
class Kernel:
    """A bootable kernel, and what was kept of its build.

    Attributes:
        name: as it was asked for.
        release: as `uname -r` gives it.
        image: the bzImage.
        config: its configuration; this and the rest are None where they are not known.
        system_map: its symbols and their addresses.
        vmlinux: the kernel before compression.
        headers: the folder of its installed headers, with linux/ in it.
        source: what it was built from; None for an image that came ready.
    """

    name: str
    release: str
    image: Path
    config: Path | None = None
    system_map: Path | None = None
    vmlinux: Path | None = None
    headers: Path | None = None
    source: Source | None = None

    @classmethod
    def find(cls, what: Kernel | str | os.PathLike[str], *, config: Sequence[str] = ()) -> Kernel:
        """The kernel that is meant; it is built if it is not in the cache.

        Of an image that is ready the configuration and the symbols are known if it lies in the
        folder that kbuild made it in, or in pyluo's cache.

        Args:
            what: a kernel; the name of one in kernels.toml; or the path of a bzImage, of a kernel
                tree, or of a tarball of one.
            config: paths of Kconfig fragments, and lines like ``CONFIG_X=y``, beyond those that it
                is built with anyway.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built; or it is there already,
                and `config` asks for it to be configured.
        """
        if isinstance(what, Kernel):
            return what
        name = os.fspath(what)
        if not is_image(name):
            return cls.build(name, config=config)
        if config:
            raise HarnessError(
                f"{name} is built already, and {' '.join(config)} is for its configuration",
                "give the path of the tree that it was built from",
            )
        path = Path(name).absolute()
        return cls(name, _release(path), path, *_beside(path))

    def has(self, option: str) -> bool:
        """Whether it was built with an option, CONFIG_ included; no if that is not known."""
        return self.config is not None and f"{option}=y" in self.config.read_text().splitlines()

    @classmethod
    def build(cls, name: str, *, config: Sequence[str] = (), update: bool = False) -> Kernel:
        """Builds a kernel of kernels.toml, a tree or a tarball, unless the cache has it.

        Args:
            name: as for `find`.
            config: as for `find`.
            update: ask the archive for a newer version first.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built.
        """
        spec, source = _recipe(name, update)
        fragments = [Fragment.load(fragment) for fragment in spec.fragments]
        fragments += [Fragment.read(item) for item in config]
        folder = _settled_folder(name, config) or build.build(source, fragments)
        return cls(
            name,
            _release(folder / build.IMAGE),
            folder / build.IMAGE,
            folder / build.CONFIG,
            folder / build.SYSTEM_MAP,
            folder / build.VMLINUX,
            folder / build.HEADERS / "include",
            source,
        )


def settled(kernels: Sequence[Kernel], config: Sequence[str]) -> dict[str, str]:
    """For the environment of processes that are to find these very kernels by their names, though
    somebody edits a tree meanwhile.

    Args:
        kernels: as they were found.
        config: that they were found with.
    """
    built = [
        [kernel.name, list(config), os.fspath(kernel.image.parent)]
        for kernel in kernels
        if kernel.source is not None
    ]
    return {_SETTLED: json.dumps(built)}


def _settled_folder(name: str, config: Sequence[str]) -> Path | None:
    for *found, folder in json.loads(os.environ.get(_SETTLED, "[]")):
        if found == [name, list(config)]:
            return Path(folder)
    return None


def is_image(name: str) -> bool:
    """Whether this is the path of a kernel that need not be built."""
    return name not in catalogue() and Path(name).is_file() and not name.endswith(_TARBALLS)


def _beside(image: Path) -> tuple[Path | None, Path | None, Path | None]:
    """The config, System.map and vmlinux of an image's build, if it lies where that left it.

    A vmlinux that was linked again since then has other addresses: with it, nothing is known.
    """
    folder = image.resolve().parent
    if folder.parts[-3:] == ("arch", "x86", "boot"):
        folder, config = folder.parents[2], ".config"
    else:
        config = build.CONFIG
    files = folder / config, folder / build.SYSTEM_MAP, folder / build.VMLINUX
    if not all(file.is_file() for file in files) or not _linked_into(image, files[-1]):
        return None, None, None
    return files


def _linked_into(image: Path, vmlinux: Path) -> bool:
    """Whether an image was made of this vmlinux, by the version that each has in it."""
    if not vmlinux.stat().st_size:  # of a link that failed; nothing to map
        return False
    builder, _, version = _version(image).partition(b") ")
    with (
        vmlinux.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(b"Linux version %s) " % builder) >= 0 and content.find(version) >= 0


def _recipe(name: str, update: bool) -> tuple[KernelSpec, Source]:
    known = catalogue()
    if name in known:
        return known[name], choose(known[name], update=update)
    path = Path(name).absolute()
    # What is not in kernels.toml is built like its first kernel.
    spec = next(iter(known.values()))
    if (path / "Kbuild").is_file():
        return spec, Tree(path)
    if path.is_file() and name.endswith(_TARBALLS):
        return spec, Tarball(path)
    raise HarnessError(
        f"there is no kernel {name!r}",
        f"name one of {', '.join(known)}, or give the path of a bzImage, a tree or a tarball",
    )


def _release(image: Path) -> str:
    """The release that a bzImage says it is.

    Raises:
        HarnessError: it is no bzImage.
    """
    return _version(image).split(b" ", 1)[0].decode()


def _version(image: Path) -> bytes:
    """The release of a bzImage, who built it, and the build's version: `uname -r`, then `-v`."""
    with image.open("rb") as file:
        head = file.read(1 << 16)
    if head[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise HarnessError(f"{image} is no bzImage", "it lacks the boot header's magic number")
    (offset,) = struct.unpack_from("<H", head, _VERSION_AT)
    return head[_VERSION_BASE + offset :].split(b"\0", 1)[0]
