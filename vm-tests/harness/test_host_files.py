"""Tests that a guest sees the host's files as they are when it gets a request."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import guest_host_files
from pyluo.vm import cache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from pyluo.vm import VM


@pytest.fixture(params=["in /tmp", "elsewhere"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the host; a guest sees its /tmp through an overlay."""
    parent = "/tmp" if request.param == "in /tmp" else cache.folder()
    with tempfile.TemporaryDirectory(dir=parent, prefix="host-files-") as path:
        yield Path(path)


def test_what_the_host_wrote_is_read(shared_vm: VM, folder: Path) -> None:
    file = folder / "file"
    for text in ("1", "22", "33", "4" * 10000, ""):
        file.write_text(text)
        assert shared_vm.call(guest_host_files.look, str(file)) == (len(text), text)


def test_a_change_that_leaves_the_time_as_it_was_is_read(shared_vm: VM, folder: Path) -> None:
    file = folder / "file"
    for text in ("1", "2"):
        file.write_text(text)
        os.utime(file, (0, 0))
        assert shared_vm.call(guest_host_files.look, str(file)) == (1, text)


def test_a_file_that_was_missing_is_found_and_one_that_went_is_not(
    shared_vm: VM, folder: Path
) -> None:
    file = folder / "file"
    assert shared_vm.call(guest_host_files.look, str(file)) is None
    file.write_text("new")
    assert shared_vm.call(guest_host_files.look, str(file)) == (3, "new")
    assert shared_vm.call(guest_host_files.names, str(folder)) == ["file"]
    file.unlink()
    assert shared_vm.call(guest_host_files.look, str(file)) is None
    assert shared_vm.call(guest_host_files.names, str(folder)) == []


def test_renames_are_seen(shared_vm: VM, folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
        path = str(folder / name / "file")
        assert shared_vm.call(guest_host_files.look, path) == (1, name)
    (folder / "a").rename(folder / "c")
    (folder / "b").rename(folder / "a")
    assert shared_vm.call(guest_host_files.look, str(folder / "a" / "file")) == (1, "b")
    assert shared_vm.call(guest_host_files.look, str(folder / "c" / "file")) == (1, "a")
    assert shared_vm.call(guest_host_files.look, str(folder / "b" / "file")) is None


def test_another_target_of_a_symbolic_link_is_seen(shared_vm: VM, folder: Path) -> None:
    link = folder / "link"
    for name in ("a", "b"):
        (folder / name).write_text(name)
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        assert shared_vm.call(guest_host_files.look, str(link)) == (1, name)


def test_a_program_that_was_changed_runs_as_it_is_now(shared_vm: VM, folder: Path) -> None:
    program = folder / "program"
    for number in (1, 2):
        program.write_text(f"#!/bin/sh\necho {number}\n")
        program.chmod(0o755)
        assert shared_vm.run([program]).stdout == b"%d\n" % number


@pytest.fixture
def modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The files of a module that can be called, and of a module that it imports."""
    monkeypatch.syspath_prepend(folder)
    called, helper = folder / "called_module.py", folder / "helper_module.py"
    called.write_text("import helper_module\n\n\ndef get(): return 'a', helper_module.VALUE\n")
    helper.write_text("VALUE = 'b'\n")
    yield called, helper
    for path in (called, helper):
        sys.modules.pop(path.stem, None)


def imported(file: Path) -> ModuleType:
    sys.modules.pop(file.stem, None)
    importlib.invalidate_caches()
    return importlib.import_module(file.stem)


@pytest.mark.parametrize("same_second", [True, False])
def test_a_module_that_was_changed_is_imported_again(
    shared_vm: VM, modules: tuple[Path, Path], *, same_second: bool
) -> None:
    called, helper = modules
    function = imported(called).get
    assert shared_vm.call(function) == ("a", "b")
    for file, old, new in ((called, "'a'", "'c'"), (helper, "'b'", "'d'")):
        stat = file.stat()
        file.write_text(file.read_text().replace(old, new))
        seconds = stat.st_mtime if same_second else stat.st_mtime + 10
        os.utime(file, (seconds, seconds))
        expected = {"'a'": ("c", "b"), "'b'": ("c", "d")}[old]
        assert shared_vm.call(function) == expected


def test_bytecode_of_the_same_second_is_not_taken_for_the_module(
    vm: VM, modules: tuple[Path, Path]
) -> None:
    called, _ = modules
    imported(called)  # writes the bytecode
    stat = called.stat()
    called.write_text(called.read_text().replace("'a'", "'e'"))
    os.utime(called, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert vm.call(sys.modules[called.stem].get)[0] == "e"
