"""Run the body of a test in a guest. The plugin calls `run` there; nothing else imports this."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, Any

from pyluo.guest import wire

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["run"]


def run(reference: str, file: str, arguments: dict[str, Any]) -> None:
    """Run a test function, so that an assertion that fails tells its values.

    Args:
        reference: the name of the function, as `wire.reference` returned it.
        file: the file of its module.
        arguments: the keyword arguments of the function.
    """
    name = reference.partition(":")[0]
    if name not in sys.modules:
        _load(name, file)
    wire.resolve(reference)(**arguments)


def _load(name: str, file: str) -> None:
    """Import a module, with its assertions rewritten as pytest does on the host."""
    package, _, last = name.rpartition(".")
    if package:
        importlib.import_module(package)
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file))
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if package:
        setattr(sys.modules[package], last, module)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module, never from bytecode: that has plain assertions."""
        source = self.get_data(self.path)
        tree = ast.parse(source, self.path)
        # pytest has no public interface for this; without it, a failure has no values.
        try:
            from _pytest.assertion.rewrite import rewrite_asserts

            rewrite_asserts(tree, source, self.path)
        except (ImportError, TypeError):
            tree = ast.parse(source, self.path)
        code: CodeType = compile(tree, self.path, "exec", dont_inherit=True)
        return code
