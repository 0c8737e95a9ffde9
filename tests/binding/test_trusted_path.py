"""Tests of walking paths; those with folders of other users need root, and so run in a guest."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from pyluo import RequestError
from pyluo.trusted_path import open_file, open_folder

if TYPE_CHECKING:
    from pathlib import Path


def is_same(fd: int, path: Path) -> bool:
    """Close a descriptor, and return whether it was of the file with a path."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    finally:
        os.close(fd)


def test_a_path_leads_where_it_leads_for_everybody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x")
    (tmp_path / "absolute").symlink_to(tmp_path / "a")
    (tmp_path / "relative").symlink_to("absolute/b")
    (tmp_path / "a" / "up").symlink_to("../relative/file")
    (tmp_path / "a" / "chain").symlink_to("up")
    monkeypatch.chdir(tmp_path / "a")
    file = tmp_path / "a" / "b" / "file"
    for path in ("b/file", "./b//file", "../relative/file", "up", "chain", tmp_path / "a/chain"):
        assert is_same(open_file(path), file), path
    for path in ("b", "b/", "../relative", "b/../b", tmp_path / "absolute" / "b"):
        assert is_same(open_folder(path), tmp_path / "a" / "b"), path
    for path in (".", "b/..", "../a/."):
        assert is_same(open_folder(path), tmp_path / "a"), path
    assert is_same(open_folder("/"), tmp_path.parents[-1])


def test_folders_are_made_only_if_that_is_asked_for(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b" / "c"
    with pytest.raises(RequestError) as caught:
        open_folder(wanted)
    assert caught.value.errno == errno.ENOENT
    for _ in range(2):
        assert is_same(open_folder(wanted, create=True), wanted)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("", errno.ENOENT),
        ("missing", errno.ENOENT),
        ("file/below", errno.ENOTDIR),
        ("loop", errno.ELOOP),
        ("dangling", errno.ENOENT),
    ],
)
def test_what_leads_nowhere_is_told_as_such_and_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, number: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing")
    before = os.listdir("/proc/self/fd")
    for open_path in (open_file, open_folder):
        with pytest.raises(RequestError) as caught:
            open_path(path)
        assert caught.value.errno == number
    assert os.listdir("/proc/self/fd") == before
