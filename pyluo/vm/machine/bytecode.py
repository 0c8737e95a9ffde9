"""Bytecode for what a guest imports.

A guest cannot write any: its root is read-only. Without it each life compiles pyluo anew, half a
second of every jump under emulation.
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

__all__ = ["provide", "provide_package"]


def provide_package(folder: Path) -> None:
    """Compiles a package's modules whose bytecode is missing or older than they are."""
    provide(path for part in (folder, folder / "guest") for path in part.glob("*.py"))


def provide(sources: Iterable[Path]) -> None:
    """Compiles the sources whose bytecode is missing or older, where it may be written at all."""
    for source in sources:
        compiled = importlib.util.cache_from_source(os.fspath(source))
        # A folder that cannot be written to, or a file that does not parse: the guest will say so.
        with suppress(OSError, py_compile.PyCompileError):
            if not _fresh(source, Path(compiled)):
                py_compile.compile(os.fspath(source), compiled, doraise=True)


def _fresh(source: Path, compiled: Path) -> bool:
    """Whether bytecode carries the time and the size of its source, as the import checks."""
    try:
        header = compiled.read_bytes()[:16]
    except OSError:
        return False
    stat = source.stat()
    fields = [int.from_bytes(header[at : at + 4], "little") for at in (4, 8, 12)]
    expected = [0, int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF]
    return header[:4] == importlib.util.MAGIC_NUMBER and fields == expected
