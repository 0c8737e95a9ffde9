"""Tests of the docstrings, types and exports of the public names."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pyluo
from pyluo import _sys

if TYPE_CHECKING:
    from collections.abc import Iterator
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


# What a program imports; the other modules are for pyluo itself.
API = [pyluo, *(importlib.import_module(f"pyluo.{name}") for name in (
    "guards", "handoff", "iommufd", "kexec", "kho", "kvm", "network", "probe", "update", "vfio"
))]  # fmt: skip
# A number without one of these words says nothing of what it counts.
UNITS = re.compile(
    r"\b(bytes?|seconds|nanoseconds|bits|pages|MiB|kHz|errno|errnos|IOVA|address|token|descriptor"
    r"|eventfd|number|numbers|index|how many|how often|flags|mask|port|ids?|PASID|version|node"
    r"|priority|offset|register|line|signal|type|format|value|see|as for|the file)\b"
)


def public_functions() -> Iterator[Any]:
    """Yield the functions of the API, and the methods and properties of its classes."""
    exported = {getattr(module, name) for module in API for name in module.__all__}
    for thing in PUBLIC:
        if thing not in exported:
            continue
        if not inspect.isclass(thing):
            yield thing
            continue
        for base in (thing, *(base for base in thing.__bases__ if base.__name__.startswith("_"))):
            for name, member in vars(base).items():
                if not name.startswith("_") and (function := _function(member)):
                    yield function


FUNCTIONS = list({function.__qualname__: function for function in public_functions()}.values())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_a_docstring_has_units_errors_and_the_source(function: Any) -> None:
    docstring = inspect.getdoc(function) or ""
    home = sys.modules[function.__module__]
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    names = [getattr(home, node.id, None) for node in nodes if isinstance(node, ast.Name)]
    if any(isinstance(each, _sys.Ioctl | _sys.PlainIoctl) for each in names):
        assert "Source: " in docstring
    if any(isinstance(node, ast.Raise) and node.exc for node in nodes):
        assert "Raises:" in docstring
    arguments = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    for parameter in inspect.signature(function).parameters.values():
        if arguments and parameter.name not in ("self", "cls"):
            told = re.search(rf"^ +\*{{0,2}}{parameter.name}: (.*(\n {{8}}.*)*)", arguments, re.M)
            assert told, parameter.name
            if re.search(r"\b(int|float)\b", str(parameter.annotation)):
                assert UNITS.search(told[1]), told[1]
