"""Compile the modules that a guest imports to bytecode.

A guest cannot write bytecode itself, because its root is read-only. Without bytecode, it would
compile pyluo again after every jump, which takes half a second under TCG.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import py_compile
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType

__all__ = ["compile_as", "compile_modules", "compile_package"]


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


def compile_as(tag: str, source: Path, compile_module: Callable[[str], CodeType]) -> Path | None:
    """Compile a module in another way than Python does, unless the result is up to date.

    Args:
        tag: the name of the way, of letters and digits.
        source: the path of the module.
        compile_module: the function that compiles it.

    Returns:
        The path of the bytecode; None if it cannot, or should not, be written.
    """
    path = Path(importlib.util.cache_from_source(os.fspath(source), optimization=tag))
    if sys.dont_write_bytecode:
        return None
    with suppress(OSError):
        if not _is_fresh(source, path):
            stat = source.stat()  # before it is read: if it changes meanwhile, this is out of date
            fields = [0, int(stat.st_mtime), stat.st_size]
            header = b"".join((field & 0xFFFFFFFF).to_bytes(4, "little") for field in fields)
            code = marshal.dumps(compile_module(os.fspath(source)))
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(importlib.util.MAGIC_NUMBER + header + code)
            os.chmod(file.name, stat.st_mode & 0o666)
            os.replace(file.name, path)
        return path
    return None


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
