"""Run the body of a test in a guest. The plugin calls `run` there; nothing else imports this."""

from __future__ import annotations

import importlib
import importlib.util
import marshal
import sys
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, Any

from pyluo.guest import wire
from pyluo.vm.pytest import stand_in

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["run"]


def run(reference: str, file: str, compiled: str | None, arguments: dict[str, Any]) -> None:
    """Run a test function, so that an assertion that fails tells its values.

    Args:
        reference: the name of the function, as `wire.reference` returned it.
        file: the file of its module.
        compiled: the file with the module's code, as `assertions.compile_module` made it; None if
            there is none.
        arguments: the keyword arguments of the function.
    """
    name = reference.partition(":")[0]
    if name not in sys.modules:
        _load(name, file, compiled)
    wire.resolve(reference)(**arguments)


def _load(name: str, file: str, compiled: str | None) -> None:
    """Import a module, with its assertions rewritten as pytest does on the host."""
    stand_in.install()
    package, _, last = name.rpartition(".")
    if package:
        importlib.import_module(package)
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file, compiled))
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
    def __init__(self, name: str, file: str, compiled: str | None) -> None:
        super().__init__(name, file)
        self._compiled = compiled

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module, never from Python's bytecode: that has plain assertions.

        The host's code is of no use to another version of Python, and to a guest that cannot see
        its file.
        """
        if self._compiled is not None:
            try:
                data = self.get_data(self._compiled)
            except OSError:
                data = b""
            if data.startswith(importlib.util.MAGIC_NUMBER):
                code: CodeType = marshal.loads(data[16:])
                return code
        from pyluo.vm.pytest.assertions import compile_module

        return compile_module(self.path)
