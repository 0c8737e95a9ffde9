"""A folder that a guest can have as its root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pyluo.vm.errors import HarnessError
from pyluo.vm.roots import build
from pyluo.vm.roots.catalogue import catalogue

__all__ = ["MOUNTS", "PYTHON", "SYSTEMD", "Root"]

SYSTEMD = "usr/lib/systemd/systemd"
PYTHON = "usr/bin/python3"

# systemd leaves alone what is mounted below this folder: it is meant to stay from before systemd's
# start until after its end. It would try to unmount anything else before it jumps.
MOUNTS = "/run/initramfs"

# The files of a root that the harness needs, and the packages of Debian that have them.
_NEEDED = {
    "usr/bin/sh": "dash",
    "usr/bin/mount": "mount",
    SYSTEMD: "systemd",
    PYTHON: "python3",
    "usr/lib/python3*/*-packages/_cffi_backend.*.so": "python3-cffi-backend",
}


@dataclass(frozen=True, slots=True)
class Root:
    """A folder that a guest can have as its root: one of an operating system with systemd.

    Attributes:
        name: the name or the path by which the user asked for the root.
        folder: the folder.
    """

    name: str
    folder: Path

    @classmethod
    def find(cls, what: Root | str | os.PathLike[str]) -> Root:
        """Return a root, and make it first if it has a name and is not in the cache.

        Args:
            what: a `Root`, which is returned; the name of a root in roots.toml; or the path of a
                folder with an operating system.

        Raises:
            HarnessError: there is no such root, it cannot be made, or a guest cannot run on it.
        """
        if isinstance(what, Root):
            return what
        name = os.fspath(what)
        known = catalogue()
        if name in known:
            return cls.build(name)
        folder = Path(name).absolute()
        if not folder.is_dir():
            raise HarnessError(
                f"there is no root {name!r}",
                f"name one of {', '.join(known)}, or give the path of a folder",
            )
        return cls(name, folder)._check()

    @classmethod
    def build(cls, name: str, *, update: bool = False) -> Root:
        """Return a root that has a name, and make it first unless the cache has it.

        Args:
            name: the name of the root in roots.toml.
            update: whether to ask the archive for newer versions first.

        Raises:
            HarnessError: there is no such root, or it cannot be made.
        """
        known = catalogue()
        if name not in known:
            raise HarnessError(f"there is no root {name!r}", f"name one of {', '.join(known)}")
        return cls(name, build.build(known[name], update=update))._check()

    @staticmethod
    def host_path(path: str | os.PathLike[str]) -> str:
        """Return the path of a file or folder of the host, in a guest that has such a root."""
        return f"{MOUNTS}/host{os.path.abspath(path)}"

    @property
    def owned(self) -> bool:
        """Whether the files belong to the user, and not to root, because the user made them."""
        return os.geteuid() != 0 and self.folder.stat().st_uid == os.geteuid()

    def _check(self) -> Root:
        missing = [package for path, package in _NEEDED.items() if not any(self.folder.glob(path))]
        if missing:
            raise HarnessError(
                f"the root {self.name} cannot be a guest's",
                f"it lacks what Debian has in {', '.join(missing)}",
            )
        return self
