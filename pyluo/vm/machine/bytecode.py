"""Compile the modules that a guest imports to bytecode.

A guest cannot write bytecode itself, because its root is read-only. Without bytecode, it would
compile pyluo again after every jump, which takes half a second under TCG.
"""

from __future__ import annotations

import importlib.util
import os
import py_compile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["compile_modules", "compile_package"]


def compile_package(folder: Path) -> None:
    """Compile the modules of pyluo and `pyluo.guest` whose bytecode is missing or out of date.

    Args:
        folder: the folder of the package pyluo.
    """
    compile_modules(path for part in (folder, folder / "guest") for path in part.glob("*.py"))


def compile_modules(sources: Iterable[Path]) -> None:
    """Compile the modules whose bytecode is missing or out of date, if it can be written.

    Args:
        sources: the paths of the modules.
    """
    for source in sources:
        compiled = importlib.util.cache_from_source(os.fspath(source))
        # The folder may be read-only; an error in the source is reported when the guest imports it.
        with suppress(OSError, py_compile.PyCompileError):
            if not _is_fresh(source, Path(compiled)):
                py_compile.compile(os.fspath(source), compiled, doraise=True)


def _is_fresh(source: Path, compiled: Path) -> bool:
    """Return whether bytecode is up to date.

    An import checks only whether the bytecode's header has the time in seconds and the size of the
    source. Both can be the same after a change of the source, so the bytecode must be newer than
    the last change.
    """
    stat = source.stat()
    try:
        header = compiled.read_bytes()[:16]
        written = compiled.stat().st_mtime
    except OSError:
        return False
    if written <= stat.st_ctime:
        return False
    fields = [int.from_bytes(header[at : at + 4], "little") for at in (4, 8, 12)]
    expected = [0, int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF]
    return header[:4] == importlib.util.MAGIC_NUMBER and fields == expected
