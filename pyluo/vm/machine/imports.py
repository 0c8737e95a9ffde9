"""From where this process imports modules, for a guest that is to import them as well."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import pyluo

__all__ = ["GUEST", "find_source", "import_path", "is_standard", "packages_off_path", "pyluo_path"]

GUEST = Path(pyluo.__file__).parent / "guest"
_STANDARD = frozenset(
    os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")
)

_DYNAMIC = "lib-dynload"


def find_source(reference: str) -> str | None:
    """Return the file of the module that a reference names; None for a built-in module.

    Args:
        reference: the name of a function, as `wire.reference` returned it.
    """
    module = sys.modules.get(reference.partition(":")[0])
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else None


@functools.cache
def pyluo_path(network: bool = False) -> list[str]:
    """Return the folders from which a guest can import pyluo and its dependencies.

    Args:
        network: whether the guest needs pyroute2, for its network.
    """
    folders = [GUEST.parent.parent]
    for module, needed in (("_cffi_backend", True), ("pyroute2", network)):
        spec = importlib.util.find_spec(module) if needed else None
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            folders.append((origin.parent if spec.submodule_search_locations else origin).parent)
    return list(dict.fromkeys(map(os.fspath, folders)))


def packages_off_path() -> dict[str, list[str]]:
    """Return the top-level packages and modules that an import hook finds, outside of sys.path.

    Editable installations use such hooks. The result has the paths of the folders or of the file.
    """
    return _packages_off_path(len(sys.modules), tuple(sys.path))


@functools.lru_cache(1)
def _packages_off_path(modules: int, path: tuple[str, ...]) -> dict[str, list[str]]:
    """Do the work of `packages_off_path`.

    Args:
        modules: the number of imported modules; the result is the same as long as this and `path`
            are.
        path: sys.path.
    """
    del modules
    found: dict[str, list[str]] = {}
    for finder in sys.meta_path:  # setuptools: {name: path}
        mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", {})
        for name, home in mapping.items():
            found[name] = [home if os.path.isdir(home) else f"{home.removesuffix('.py')}.py"]
    for name, module in list(sys.modules.items()):
        if "." not in name and name != "__main__":
            paths = list(getattr(module, "__path__", ()))
            file = getattr(module, "__file__", None)
            if paths or (file and file.endswith(".py")):
                found[name] = paths or [file]
    here = set(map(os.path.abspath, path))
    return {
        name: [os.path.abspath(path) for path in paths]
        for name, paths in found.items()
        if any(os.path.dirname(os.path.abspath(path)) not in here for path in paths)
    }


def import_path() -> list[str]:
    """Return this process's sys.path as absolute paths, with the folders that pyluo needs.

    The folder of an editable installation of pyluo need not be in sys.path.
    """
    here = [os.path.abspath(entry) for entry in sys.path]
    return [*here, *(entry for entry in pyluo_path() if entry not in here)]


def is_standard(entry: str) -> bool:
    """Return whether an entry of sys.path has this Python's own library, of use to no other one."""
    real = os.path.realpath(entry)
    folder, name = os.path.split(real)
    return real in _STANDARD or name.endswith(".zip") or (folder in _STANDARD and name == _DYNAMIC)
