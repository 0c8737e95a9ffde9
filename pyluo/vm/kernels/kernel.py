"""A kernel that can be booted."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.kexec.bzimage import BzImageHeader
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels.catalogue import KernelSpec, catalogue
from pyluo.vm.kernels.files import CONFIG, HEADERS, IMAGE, SIGNING_KEY, SYSTEM_MAP, VMLINUX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.kernels.source import Source

__all__ = ["Kernel", "is_image", "pin_kernels"]

_INSTALLED_CONFIG = "config"
_PINNED = "PYLUO_KERNELS"  # the environment variable that `pin_kernels` returns

_TARBALLS = (".tar", ".tar.gz", ".tar.xz", ".tar.zst", ".tar.bz2", ".tgz", ".txz")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A bootable kernel, and the files that its build left.

    Attributes:
        name: the name or the path by which the user asked for the kernel.
        release: the kernel's release, as `uname -r` prints it.
        image: the path of the bzImage.
        config: the path of the configuration; None if it is not known.
        system_map: the path of System.map, with the addresses of symbols; None if it is not known.
        vmlinux: the path of the uncompressed kernel; None if it is not known.
        headers: the folder of the installed headers, which contains linux/; None if it is not
            known.
        source: the source that the kernel was built from; None for a bzImage that was given by its
            path.
        signing_key: the path of the private key and the certificate of the build, whose signatures
            the kernel accepts; None if it is not known.
    """

    name: str
    release: str
    image: Path
    config: Path | None = None
    system_map: Path | None = None
    vmlinux: Path | None = None
    headers: Path | None = None
    source: Source | None = None
    signing_key: Path | None = None

    @classmethod
    def find(cls, what: Kernel | str | os.PathLike[str], *, config: Sequence[str] = ()) -> Kernel:
        """Return a kernel, and build it first if it is not in the cache.

        The configuration and the symbols of a bzImage are known if the bzImage is in the folder
        where kbuild created it, or in pyluo's cache.

        Args:
            what: a `Kernel`, which is returned; the name of a kernel in kernels.toml; or the path
                of a bzImage, of a kernel tree, or of a tarball of a kernel tree.
            config: paths of Kconfig fragments, and lines like ``CONFIG_X=y``, to add to the
                kernel's usual fragments.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built; or `what` is a bzImage,
                to which `config` cannot be applied.
        """
        if isinstance(what, Kernel):
            return what
        name = os.fspath(what)
        if not is_image(name):
            return cls.build(name, config=config)
        if config:
            raise HarnessError(
                f"{name} is built already and cannot be configured with {' '.join(config)}",
                "give the path of the tree that it was built from",
            )
        path = Path(name).absolute()
        return cls(name, _read_release(path), path, *_find_build_files(path))

    def has(self, option: str) -> bool:
        """Return whether the kernel was built with an option; False if its config is not known.

        Args:
            option: the name of the option, with its prefix ``CONFIG_``.
        """
        return self.config is not None and f"{option}=y" in self.config.read_text().splitlines()

    @classmethod
    def build(cls, name: str, *, config: Sequence[str] = (), update: bool = False) -> Kernel:
        """Return a kernel of kernels.toml, a tree or a tarball; build it unless the cache has it.

        Args:
            name: the name in kernels.toml, or the path of the tree or of the tarball.
            config: paths of Kconfig fragments, and lines like ``CONFIG_X=y``, to add to the
                kernel's usual fragments.
            update: whether to ask the archive for a newer version first.

        Raises:
            HarnessError: there is no such kernel, or it cannot be built.
        """
        from pyluo.vm.kernels.build import build
        from pyluo.vm.kernels.kconfig import Fragment

        spec, source = _find_source(name, update)
        fragments = [Fragment.load(fragment) for fragment in spec.fragments]
        fragments += [Fragment.read(item) for item in config]
        folder = _find_pinned(name, config) or build(source, fragments)
        key = folder / SIGNING_KEY
        return cls(
            name,
            _read_release(folder / IMAGE),
            folder / IMAGE,
            folder / CONFIG,
            folder / SYSTEM_MAP,
            folder / VMLINUX,
            folder / HEADERS / "include",
            source,
            key if key.exists() else None,
        )


def pin_kernels(kernels: Sequence[Kernel], config: Sequence[str]) -> dict[str, str]:
    """Return an environment variable that pins the names of kernels to these builds.

    If a process has the variable in its environment, `Kernel.find` and `Kernel.build` return these
    builds for these names, even if a tree was edited in the meantime.

    Args:
        kernels: the kernels.
        config: the argument `config` with which the kernels were found.
    """
    built = [
        [kernel.name, list(config), os.fspath(kernel.image.parent)]
        for kernel in kernels
        if kernel.source is not None
    ]
    return {_PINNED: json.dumps(built)}


def _find_pinned(name: str, config: Sequence[str]) -> Path | None:
    for *pinned, folder in json.loads(os.environ.get(_PINNED, "[]")):
        if pinned == [name, list(config)]:
            return Path(folder)
    return None


def is_image(name: str) -> bool:
    """Return whether a name is the path of a kernel image, and not of a source to build."""
    return name not in catalogue() and Path(name).is_file() and not name.endswith(_TARBALLS)


def _find_build_files(image: Path) -> tuple[Path | None, Path | None, Path | None]:
    """Return the paths of an image's config, System.map and vmlinux, each None if not known.

    They are known if the image is where its build left it. If vmlinux was linked again after the
    image was made, its addresses are different, so that the result is three times None. Of a
    distribution's image, the config is known: of /boot/vmlinuz-RELEASE it is /boot/config-RELEASE.
    """
    folder = image.resolve().parent
    kind, dash, release = image.resolve().name.partition("-")
    installed = folder / f"{_INSTALLED_CONFIG}{dash}{release}"
    if dash and kind == "vmlinuz" and installed.is_file():
        return installed, None, None
    if folder.parts[-3:] == ("arch", "x86", "boot"):
        folder, config = folder.parents[2], ".config"
    else:
        config = CONFIG
    files = folder / config, folder / SYSTEM_MAP, folder / VMLINUX
    if not all(file.is_file() for file in files) or not _is_made_from(image, files[-1]):
        return None, None, None
    return files


def _is_made_from(image: Path, vmlinux: Path) -> bool:
    """Return whether an image was made from a vmlinux: whether both contain the same version."""
    if not vmlinux.stat().st_size:  # a failed link left it; an empty file cannot be mapped
        return False
    builder, _, version = _read_version(image).partition(b") ")
    with (
        vmlinux.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(b"Linux version %s) " % builder) >= 0 and content.find(version) >= 0


def _find_source(name: str, update: bool) -> tuple[KernelSpec, Source]:
    """Return how to build the kernel that a name or path means, and its source.

    Args:
        name: the name in kernels.toml, or the path of a tree or of a tarball.
        update: whether to ask the archive for a newer version first.

    Raises:
        HarnessError: there is no such kernel.
    """
    from pyluo.vm.kernels.source import Tarball, Tree, choose

    known = catalogue()
    if name in known:
        return known[name], choose(known[name], update=update)
    path = Path(name).absolute()
    # A kernel that is not in kernels.toml is built like the first kernel there.
    spec = next(iter(known.values()))
    if (path / "Kbuild").is_file():
        return spec, Tree(path)
    if path.is_file() and name.endswith(_TARBALLS):
        return spec, Tarball(path)
    raise HarnessError(
        f"there is no kernel {name!r}",
        f"name one of {', '.join(known)}, or give the path of a bzImage, a tree or a tarball",
    )


def _read_release(image: Path) -> str:
    """Return the kernel release that a bzImage contains, as `uname -r` prints it.

    Raises:
        HarnessError: the file is no bzImage.
    """
    return _read_version(image).split(b" ", 1)[0].decode()


def _read_version(image: Path) -> bytes:
    """Return the version text that a bzImage contains.

    Raises:
        HarnessError: the file is no bzImage.
    """
    with image.open("rb") as file:
        header = BzImageHeader.read(file.fileno())
    if header is None:
        raise HarnessError(f"{image} is no bzImage", "it lacks the boot header's magic number")
    return header.version.encode("latin-1")
