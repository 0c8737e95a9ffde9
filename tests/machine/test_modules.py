"""Tests of the archive of the modules that a guest imports. Python's options are a guest's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pyluo
from pyluo.guest import archive
from pyluo.vm.machine import imports, modules

# Imports modules as a guest does; prints the class of each one's loader, and its attribute ADDED.
AS_A_GUEST = """
import json, sys
_, path, folders, *names = sys.argv
sys.path += folders.split(":")
from pyluo.guest import archive
archive.install(path)
import importlib
answers = {}
for name in names:
    module = importlib.import_module(name)
    loader = type(module.__spec__.loader)
    answers[name] = [f"{loader.__module__}.{loader.__name__}", getattr(module, "ADDED", None)]
    assert module.__spec__.origin == module.__file__, name
print(json.dumps(answers))
"""
FROM_ARCHIVE, FROM_FILE = "pyluo.guest.archive._Loader", "SourceFileLoader"


def import_as_a_guest(path: Path | str, folders: list[str], *names: str) -> dict[str, list[Any]]:
    command = [sys.executable, "-B", "-I", "-S", "-X", "utf8", "-c", AS_A_GUEST]
    command += [os.fspath(path), ":".join(folders), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers: dict[str, list[Any]] = json.loads(done.stdout)
    return answers


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of pyluo, from which guests would import it, and an empty cache."""
    package = tmp_path / "pyluo"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(pyluo.__file__).parent, package, ignore=ignored)
    folders = [os.fspath(tmp_path), *imports.pyluo_path()[1:]]
    monkeypatch.setattr(imports, "pyluo_path", lambda: folders)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    return package


def test_archives_that_nobody_used_for_a_week_are_removed(copied: Path) -> None:
    path = modules.find_archive()
    of_another_checkout, used = path.with_name("modules-1.marshal"), path.with_name("modules-2.x")
    for other, days in ((of_another_checkout, 8), (used, 6), (path, 8)):
        other.touch()
        os.utime(other, (time.time() - days * 86400,) * 2)
    modules._indexes.clear()  # as in a new process, which uses the archive
    assert modules.find_archive() == path
    assert of_another_checkout.exists()
    (copied / "numa.py").write_text("ADDED = 1\n")
    assert modules.find_archive() == path
    assert (path.exists(), used.exists(), of_another_checkout.exists()) == (True, True, False)


def test_a_guest_imports_what_the_archive_has_and_leaves_what_was_edited(copied: Path) -> None:
    folders = imports.pyluo_path()
    path = modules.find_archive()
    names = "pyluo.guest.worker", "pyluo.stores.outgoing", "selectors", "pyluo.numa"
    answers = import_as_a_guest(path, folders, *names, "pyluo._ffi")
    assert {name: answers[name][0] for name in names} == dict.fromkeys(names, FROM_ARCHIVE)
    assert "ExtensionFileLoader" in answers["pyluo._ffi"][0]

    edited = copied / "numa.py"
    state = edited.stat()
    text = edited.read_text()
    edited.write_text(text + "ADDED = 1\n")
    loader, added = import_as_a_guest(path, folders, "pyluo.numa")["pyluo.numa"]
    assert (loader.endswith(FROM_FILE), added) == (True, 1)

    # The archive is made again, also if neither the time nor the size tells.
    assert modules.find_archive() == path
    assert import_as_a_guest(path, folders, "pyluo.numa") == {"pyluo.numa": [FROM_ARCHIVE, 1]}
    edited.write_text(text + "ADDED = 2\n")
    os.utime(edited, ns=(state.st_atime_ns, state.st_mtime_ns))
    modules.find_archive()
    edited.write_text(text + "ADDED = 3\n")
    os.utime(edited, ns=(state.st_atime_ns, state.st_mtime_ns))
    loader, added = import_as_a_guest(path, folders, "pyluo.numa")["pyluo.numa"]
    assert (loader.endswith(FROM_FILE), added) == (True, 3)
    modules.find_archive()
    assert import_as_a_guest(path, folders, "pyluo.numa") == {"pyluo.numa": [FROM_ARCHIVE, 3]}


def test_an_archive_that_is_up_to_date_stays(copied: Path) -> None:
    path = modules.find_archive()
    written = path.stat().st_ino
    modules._indexes.clear()
    assert modules.find_archive() == path
    assert path.stat().st_ino == written


def test_a_guest_that_sees_no_archive_does_without(tmp_path: Path) -> None:
    answers = import_as_a_guest(tmp_path / "none", imports.pyluo_path(), "pyluo.numa")
    assert answers["pyluo.numa"][0].endswith(FROM_FILE)


def test_a_module_that_cannot_be_imported_is_left_out(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "broken.py").write_text("def (")
    path = tmp_path / "archive"
    monkeypatch.setattr(
        modules, "_names", lambda: ["pyluo.no_such_module", "pyluo.broken", "pyluo.numa"]
    )
    modules._write(path, imports.pyluo_path())
    with path.open("rb") as file:
        index = archive.read_index(file.fileno())
    assert "pyluo.numa" in index
    assert not {"pyluo.no_such_module", "pyluo.broken"} & index.keys()
