"""Tests of the docstrings, types and exports of the public names."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pyluo

if TYPE_CHECKING:
    from types import ModuleType

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(pyluo.__path__, "pyluo.")
    if not info.name.endswith(("._ffi", ".__main__", ".guest.init", ".guest.service"))
]
PUBLIC = sorted(
    {
        getattr(module, name)
        for module in MODULES
        for name in getattr(module, "__all__", ())
        if inspect.isfunction(getattr(module, name)) or inspect.isclass(getattr(module, name))
    },
    key=lambda thing: f"{thing.__module__}.{thing.__qualname__}",
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_says_what_it_is_and_what_it_exports(module: ModuleType) -> None:
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_a_public_name_has_a_docstring_and_whole_types(thing: Any) -> None:
    assert thing.__doc__
    members = [thing]
    if inspect.isclass(thing):
        members = [
            function
            for name, member in vars(thing).items()
            if not name.startswith("_") and (function := _function(member))
        ]
    for member in members:
        assert member.__doc__, member
        signature = inspect.signature(member)
        assert signature.return_annotation is not inspect.Signature.empty, member
        for parameter in signature.parameters.values():
            typed = parameter.annotation is not inspect.Parameter.empty
            assert typed or parameter.name in ("self", "cls"), (member, parameter)


def _function(member: object) -> Any:
    """Return the function of a method, a class method or a property; None for anything else."""
    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    return function if inspect.isfunction(function) else None


def test_only_the_funnel_knows_the_compiled_module() -> None:
    sources = Path(pyluo.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "pyluo._ffi" in path.read_text()] == ["_sys.py"]


def test_everything_that_is_exported_is_there() -> None:
    assert [name for name in pyluo.__all__ if not hasattr(pyluo, name)] == []


def test_importing_pyluo_opens_nothing_and_brings_nothing_along() -> None:
    script = (
        "import os, sys; before = set(os.listdir('/proc/self/fd')); import pyluo;"
        "assert set(os.listdir('/proc/self/fd')) == before;"
        "print(*(name for name in ('qemu', 'rich', 'pytest', 'pyroute2') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")
