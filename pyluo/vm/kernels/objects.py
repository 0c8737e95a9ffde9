"""The objects of kernel trees, kept in the cache so that a build compiles only what changed.

make compares times: it compiles a file again if the file is newer than the object. That is wrong
for a file that was edited after the compiler had read it and before the object was written, and for
a file that was replaced by an older one. So each build records the state of the tree before it
begins, and the next build removes the objects of which make could not see that they are out of
date.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import cache
from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from pyluo.vm.kernels.source import FileState

__all__ = ["TREE", "find", "recorded"]

# A file in a folder of the cache; it contains the path of the tree that was built there.
TREE = "tree"
_STATE = ".state"  # a JSON file: the state of the tree before the last build
_IN_PROGRESS = ".in-progress"
_ENDED = ".ended"  # the modification time of this file is the end of the last build
# A change of other files can change more than the objects whose dependencies kbuild records.
_COMPILED = (".c", ".h", ".S")
_PARENT = re.compile(rb"[^/\s]+(?<!\.\.)/\.\./")
# kbuild's records for programs that run during the build contain relative paths.
_BUILD_PROGRAMS = ("scripts/", "tools/")


def find(tree: Path, name: str) -> Path:
    """Return the folder that keeps the objects of a tree; create it if it does not exist.

    This also removes the objects of trees that no longer exist, and objects that a killed build
    left. The caller must hold the lock of builds.

    Args:
        tree: the path of the tree.
        name: the name of the folder; different for other options and another compiler.
    """
    kept = cache.folder() / "objects"
    for path in kept.glob(f"*/{TREE}"):
        if not Path(path.read_text()).exists():
            shutil.rmtree(path.parent)
    folder = kept / name
    if (folder / _IN_PROGRESS).exists():
        shutil.rmtree(folder)
    cache.write(folder / TREE, os.fspath(tree))
    return folder


@contextmanager
def recorded(folder: Path, state: dict[str, FileState]) -> Iterator[None]:
    """Build in the block: before it, remove objects that make would wrongly take for up to date.

    If the build is killed, its objects are not used again: make would take a file that the compiler
    or objtool has not finished for complete. If the compiler itself fails, it removes the
    unfinished file; the block raises a HarnessError then, and the objects stay.

    Args:
        folder: the folder of the objects.
        state: the files of the tree, as they are before the build.
    """
    _remove_stale(folder, state)
    mark = folder / _IN_PROGRESS
    mark.touch()
    cache.write(folder / _STATE, json.dumps(state))
    try:
        yield
    except HarnessError:
        _end(folder, mark)
        raise
    _end(folder, mark)


def _end(folder: Path, mark: Path) -> None:
    (folder / _ENDED).touch()
    mark.unlink()


def _remove_stale(folder: Path, state: dict[str, FileState]) -> None:
    """Remove the objects that make could wrongly take for up to date; all of them if in doubt."""
    try:
        before = {
            path: tuple(each) for path, each in json.loads((folder / _STATE).read_text()).items()
        }
        ended = (folder / _ENDED).stat().st_mtime_ns
    except (OSError, ValueError, TypeError, AttributeError):
        _clear(folder)
        return
    changed = {path for path, each in state.items() if before.get(path) not in (each, None)}
    # make sees these by their times, unless the clock goes wrong.
    visible = {path for path in changed if ended < state[path].modified <= time.time_ns()}
    names = {os.path.basename(path) for path in before}
    shadowing = {
        path
        for path in state.keys() - before.keys()
        if path.endswith(".h") and os.path.basename(path) in names
    }
    # make cannot rebuild an object whose source is gone, and takes it for up to date.
    gone = {path for path in before.keys() - state.keys() if path.endswith(_COMPILED)}
    doubtful = (changed - visible) | gone
    if shadowing or not all(map(_is_recorded, doubtful)):
        _clear(folder)
    elif doubtful:
        _remove_dependents(folder, doubtful)


def _is_recorded(path: str) -> bool:
    """Return whether kbuild records which objects depend on this file."""
    return path.endswith(_COMPILED) and not path.startswith(_BUILD_PROGRAMS)


def _remove_dependents(folder: Path, paths: AbstractSet[str]) -> None:
    """Remove the objects that depend on files, by the records of kbuild (.NAME.cmd)."""
    needles = [f"/{path}".encode() for path in paths]
    for record in folder.rglob(".*.cmd"):
        text = record.read_bytes()
        while _PARENT.search(text):  # the compiler writes a/b/../c.h for a/c.h
            text = _PARENT.sub(b"", text)
        if any(needle in text for needle in needles):
            record.with_name(record.name[1 : -len(".cmd")]).unlink(missing_ok=True)
    # The exported headers have no records.
    shutil.rmtree(folder / "usr" / "include", ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove all objects in a folder."""
    for path in folder.iterdir():
        if path.name == TREE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
