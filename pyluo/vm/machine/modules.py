"""Keep the archive of the modules that guests import up to date; see `pyluo.guest.archive`."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.guest import archive
from pyluo.vm import cache
from pyluo.vm.machine import imports

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_archive"]

# The archive has these, and all that they import. Those of the first process come first, so that
# the kernel reads their codes ahead.
_NAMES = (
    "pyluo.guest.mounts",
    "pyluo.guest.worker",
    "pyluo.guest.heartbeat",
    "pyluo.vm.machine.vm",
    "pyluo.vm.pytest.in_guest",
)
_PROGRAMS = "init.py", "service.py"  # importing them would run them
_LEFT_OUT = "vm", "cli"
_KEPT = 7 * 24 * 3600.0  # seconds for which an archive is kept that nobody uses
_WRITE = """
import sys
_, path, folders, *names = sys.argv
sys.path += folders.split(":")
from pyluo.guest import archive
archive.write(path, names)
"""

_indexes: dict[Path, dict[str, archive.Entry]] = {}


def find_archive() -> Path:
    """Return the path of an archive of pyluo's modules as they are now; write it if need be.

    Raises:
        HarnessError: the cache's folder cannot be created.
        subprocess.CalledProcessError: the archive cannot be written.
    """
    folders = imports.pyluo_path()
    # The code that reads the archive is part of its name, because it knows only its own format.
    key = "\0".join([sys.version, sys.executable, *folders, inspect.getsource(archive)])
    path = cache.folder() / f"modules-{hashlib.sha256(key.encode()).hexdigest()[:16]}.marshal"
    if path not in _indexes and path.exists():
        _indexes[path] = _read_index(path)
    if path not in _indexes or not archive.is_fresh(_indexes[path]):
        _write(path, folders)
        _indexes[path] = _read_index(path)
    return path


def _write(path: Path, folders: list[str]) -> None:
    """Write an archive, by a Python with a guest's options, as modules may depend on them."""
    command = [sys.executable, "-B", "-I", "-S", "-X", "utf8", "-c", _WRITE]
    command += [os.fspath(path), ":".join(folders), *_names()]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for other in path.parent.glob("modules-*"):  # of another checkout, or of an older pyluo
        with suppress(FileNotFoundError):
            if other.stat().st_mtime < time.time() - _KEPT:
                other.unlink()


def _read_index(path: Path) -> dict[str, archive.Entry]:
    os.utime(path)  # it is in use
    with path.open("rb") as file:
        return archive.read_index(file.fileno())


def _names() -> list[str]:
    """Return the names of the modules of pyluo that a guest may import."""
    package = imports.GUEST.parent
    names = list(_NAMES)
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        if parts[0] not in _LEFT_OUT and file.name not in (*_PROGRAMS, "__main__.py"):
            names.append(".".join(("pyluo", *(part for part in parts if part != "__init__"))))
    return names
