"""Compile a test's module so that an assertion that fails in a guest tells its values.

pytest rewrites the assertions, on the host, because a guest would take seconds to import pytest. In
the guest, rewritten assertions find pytest's functions here; they need them only when they fail.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["compile_module", "tag"]

_HOME = "_pytest.assertion.rewrite"  # pytest has no public interface for this


def compile_module(file: str) -> CodeType:
    """Return the code of a module, with plain assertions if this pytest cannot rewrite them."""
    source = Path(file).read_bytes()
    tree = ast.parse(source, file)
    try:
        from _pytest.assertion.rewrite import rewrite_asserts

        rewrite_asserts(tree, source, file)
    except (ImportError, TypeError):
        tree = ast.parse(source, file)
    for statement in tree.body:
        for alias in statement.names if isinstance(statement, ast.Import) else ():
            if alias.name == _HOME and alias.asname and not alias.asname.isidentifier():
                alias.name = __name__
    code: CodeType = compile(tree, file, "exec", dont_inherit=True)
    return code


def tag() -> str:
    """Return the word that tells apart the code that different versions of pytest make."""
    import pytest

    return "pytest" + "".join(filter(str.isalnum, pytest.__version__))


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from _pytest.assertion import rewrite

    return getattr(rewrite, name)
