"""The archive: one file with the code of the modules that a guest imports in each of its lives.

Over 9p, a guest takes some five milliseconds to find a module and to read its bytecode, and each
life begins with a hundred modules. The same Python writes the archive, on the host.

What this module imports itself cannot come from the archive, so at its top it imports only what
Python has loaded anyway.
"""

from __future__ import annotations

import marshal
import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.abc import Loader
    from types import CodeType

    # The module's file, whether the module is a package, the state of the file, and the place and
    # the length of its marshalled code in the archive; a length of 0 means an extension module.
    Entry = tuple[str, bool, tuple[int, ...], int, int]

__all__ = ["install", "is_fresh", "read_index", "write"]

_PYLUO = "pyluo"
# Modules that others import and hardly ever use: executed when they are first used.
# `dataclasses` imports `inspect`, which imports six more, for classes without a docstring.
_LAZY = frozenset({"inspect"})
_TRAILER = 8  # bytes at the end: where the index begins, which is behind the codes


class _Finder:
    """Finds modules in an archive.

    Python and the packages that are installed in it stay as they are while a guest runs, but the
    files of pyluo may be edited: such a module is left to Python's own finder.

    Args:
        fd: the archive.
        index: the entries of the archive by the names of their modules.
    """

    def __init__(self, fd: int, index: dict[str, Entry]) -> None:
        self._fd = fd
        self._index = index

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return how to import a module; None if the archive does not have it as it is now."""
        entry = self._index.pop(name, None)
        if entry is None:
            return None
        file, is_package, state, at, length = entry
        if name.partition(".")[0] == _PYLUO and _state(file) != state:
            return None
        loader: Loader = ExtensionFileLoader(name, file)
        if length:
            loader = _Loader(name, file, os.pread(self._fd, length, at))
        if name in _LAZY:
            from importlib.util import LazyLoader

            loader = LazyLoader(loader)
        spec = ModuleSpec(name, loader, origin=file, is_package=is_package)
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(os.path.dirname(file))
        return spec


class _Loader(SourceFileLoader):
    """Loads a module as from its file, but has the code already."""

    def __init__(self, name: str, file: str, code: bytes) -> None:
        super().__init__(name, file)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module."""
        code: CodeType = marshal.loads(self._code)
        return code


def install(path: str) -> None:
    """Import modules from an archive, if there is one at this path, rather than from their files.

    Args:
        path: the path of the archive, as `write` wrote it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    sys.meta_path.insert(sys.meta_path.index(PathFinder), _Finder(fd, read_index(fd)))


def read_index(fd: int) -> dict[str, Entry]:
    """Return the entries of an archive by the names of their modules.

    Args:
        fd: the archive.
    """
    end = os.lseek(fd, -_TRAILER, os.SEEK_END)
    begin = int.from_bytes(os.pread(fd, _TRAILER, end), "little")
    index: dict[str, Entry] = marshal.loads(os.pread(fd, end - begin, begin))
    return index


def is_fresh(index: dict[str, Entry]) -> bool:
    """Return whether each module's file is the one that its code was made of."""
    return all(_state(file) == state for file, _, state, _, _ in index.values())


def write(path: str, names: Iterable[str]) -> None:
    """Import modules, and write an archive of them and of all that they import.

    Args:
        path: the path of the archive, which is replaced in one step.
        names: the names of the modules; one that cannot be imported is left out.
    """
    from importlib import import_module

    for name in names:
        try:
            import_module(name)
        except Exception:  # the guest is told of it, if it imports that module
            continue
    index: dict[str, Entry] = {}
    codes = bytearray()
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        spec = getattr(module, "__spec__", None)
        if spec is None or not spec.has_location or file is None:
            continue  # built in, frozen, or this process's own main module
        is_package = spec.submodule_search_locations is not None
        if isinstance(spec.loader, ExtensionFileLoader):
            index[name] = file, is_package, _state(file), 0, 0
        elif type(spec.loader) is SourceFileLoader:
            state = _state(file)  # before the file is read: if it changes then, this is no match
            code = marshal.dumps(spec.loader.source_to_code(spec.loader.get_data(file), file))
            index[name] = file, is_package, state, len(codes), len(code)
            codes += code
    written = f"{path}.{os.getpid()}"
    with open(written, "wb") as output:
        output.write(codes + marshal.dumps(index) + len(codes).to_bytes(_TRAILER, "little"))
    os.replace(written, path)


def _state(file: str) -> tuple[int, ...]:
    """Return what changes with the content of a file; empty if there is no such file."""
    try:
        stat = os.stat(file)
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size
