"""A stand-in for pytest in a guest, where importing pytest takes seconds."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install"]

_NAME = "pytest"


class _Mark:
    """A mark, or the decorator `fixture`: it leaves a function or a class as it is.

    Args:
        path: the names that lead from pytest to it.
        calls: the arguments with which it was called so far.
    """

    def __init__(self, path: tuple[str, ...], calls: tuple[Any, ...] = ()) -> None:
        self._path = path
        self._calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        return _Mark(self._path, (*self._calls, (args, kwargs)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = _import()
        for step in self._path:
            found = getattr(found, step)
        for args, kwargs in self._calls:
            found = found(*args, **kwargs)
        return getattr(found, name)


class _Marks:
    """`pytest.mark`."""

    def __getattr__(self, name: str) -> _Mark:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Mark(("mark", name))


class _StandIn(ModuleType):
    """What a guest imports as pytest.

    Marks and fixtures mean nothing in a guest, where pytest runs no tests, and most modules of
    tests need no more of pytest to be imported. If something else is used, pytest is imported.
    """

    mark = _Marks()
    fixture = _Mark(("fixture",))

    def __getattr__(self, name: str) -> Any:
        return getattr(_import(), name)


def install() -> None:
    """Put the stand-in where an import of pytest finds it, unless pytest was imported before."""
    if _NAME not in sys.modules:
        stand_in = sys.modules[_NAME] = _StandIn(_NAME)
        stand_in.__spec__ = ModuleSpec(_NAME, None)  # each import of it looks at this attribute


def _import() -> ModuleType:
    """Import pytest itself, unless it was imported before."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)
