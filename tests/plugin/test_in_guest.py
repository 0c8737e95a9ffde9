"""Tests of what makes the code of a test for a guest, and of what a guest imports as pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pyluo.vm.machine import bytecode
from pyluo.vm.pytest import assertions

if TYPE_CHECKING:
    from pathlib import Path

# Imports a module as a guest does, and prints what the functions that it names return.
AS_A_GUEST = """
import importlib, json, sys
from pyluo.vm.pytest import in_guest
name, file, compiled, *functions = json.loads(sys.argv[1])
in_guest._load(name, file, compiled)
module = sys.modules[name]
answers = [["pytest imported", "_pytest" in sys.modules]]
for function in functions:
    try:
        answers.append([function, getattr(module, function)()])
    except BaseException as error:
        answers.append([function, str(error)])
    answers.append(["pytest imported", "_pytest" in sys.modules])
print(json.dumps(answers))
"""


def run_as_a_guest(file: Path, compiled: Path | None, *functions: str) -> list[list[object]]:
    arguments = [file.stem, os.fspath(file), compiled and os.fspath(compiled), *functions]
    command = [sys.executable, "-c", AS_A_GUEST, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers: list[list[object]] = json.loads(done.stdout)
    return answers


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


def compile_test(file: Path) -> Path | None:
    return bytecode.compile_as(assertions.tag(), file, assertions.compile_module)


MODULE = """
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(True, reason="never here")]

@pytest.fixture
def bare():
    return "a fixture"

@pytest.fixture(scope="module", params=[1, 2])
def with_arguments():
    return "another"

@pytest.mark.in_guest
@pytest.mark.parametrize("number", [1, 2], ids=["one", "two"])
def plain(number=1):
    assert number == 1
    return [bare(), with_arguments()]

@pytest.mark.in_guest
class Group:
    pass

def fails():
    numbers = [1, 2]
    assert numbers == [1, 3], "they differ"

def skips():
    pytest.skip("not today")

def reads_a_mark():
    first, second = pytestmark
    return [first.name, second.args[0], second.kwargs["reason"]]

def has_a_version():
    return pytest.__version__
"""


@pytest.mark.usefixtures("compiled_here")
def test_a_guest_imports_pytest_when_a_test_needs_it(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(MODULE)
    compiled = compile_test(file)
    assert compiled is not None
    before, after = ["pytest imported", False], ["pytest imported", True]
    assert run_as_a_guest(file, compiled, "plain") == [
        before,
        ["plain", ["a fixture", "another"]],
        before,
    ]
    assert run_as_a_guest(file, compiled, "skips", "reads_a_mark", "has_a_version") == [
        before,
        ["skips", "not today"],
        after,
        ["reads_a_mark", ["slow", True, "never here"]],
        after,
        ["has_a_version", pytest.__version__],
        after,
    ]
    assert run_as_a_guest(file, compiled, "reads_a_mark")[1:] == [
        ["reads_a_mark", ["slow", True, "never here"]],
        after,
    ]


@pytest.mark.usefixtures("compiled_here")
def test_an_assertion_tells_its_values_with_and_without_the_hosts_code(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(MODULE)
    compiled = compile_test(file)
    assert compiled is not None
    foreign = tmp_path / "foreign.pyc"  # of another version of Python
    foreign.write_bytes(b"\0" * 16 + compiled.read_bytes()[16:])
    for given in (compiled, foreign, tmp_path / "not there", None):
        _, (name, told), _ = run_as_a_guest(file, given, "fails")
        assert name == "fails"
        assert "they differ" in str(told)
        assert "[1, 2] == [1, 3]" in str(told)


@pytest.mark.usefixtures("compiled_here")
def test_the_hosts_code_is_made_again_when_the_module_changed(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def answer():\n    return 1\n")
    first = compile_test(file)
    state = file.stat()
    file.write_text("def answer():\n    return 2\n")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # no later, and no longer
    second = compile_test(file)
    assert first == second
    assert second is not None
    assert run_as_a_guest(file, second, "answer")[1] == ["answer", 2]
    written = second.stat().st_mtime_ns
    assert compile_test(file) == second
    assert second.stat().st_mtime_ns == written


def test_no_code_is_written_where_python_may_not_write_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert compile_test(file) is None
    assert [each.name for each in tmp_path.iterdir()] == ["test_it.py"]


@pytest.mark.usefixtures("compiled_here")
def test_a_module_that_does_not_compile_says_why(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def (\n")
    with pytest.raises(SyntaxError):
        compile_test(file)
