"""The cache: a folder for built kernels and other files, and locks for processes that use it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["folder", "lock", "write"]


def folder() -> Path:
    """Return the folder of the cache, $XDG_CACHE_HOME/pyluo, and create it if it does not exist.

    Raises:
        HarnessError: the folder cannot be created.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base).resolve() / "pyluo"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(
            f"the cache folder {path} cannot be created ({error.strerror})",
            "set XDG_CACHE_HOME to a folder that you may write to",
        ) from None
    return path


def write(path: Path, text: str) -> None:
    """Replace the content of a file in one step: a reader sees the old text or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def lock(name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock in the block; all processes that use the cache share the lock.

    The kernel releases the lock if the process ends.

    Args:
        name: the name of the lock.
        on_wait: called once, before waiting, if another process holds the lock.
    """
    path = folder() / f"{name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
