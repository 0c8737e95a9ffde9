from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import HarnessError
from pyluo.vm.kernels.source import Tarball, Tree

if TYPE_CHECKING:
    from pathlib import Path

    from pyluo.vm.kernels.source import Source

FILES = ["Makefile", "a/top.h", "a/b/test.c", "a/b/lib/part.c", "c/a/other.h"]


@pytest.fixture(params=["tree", "tarball"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    top = tmp_path / "linux-1.0"
    for name in FILES:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    if request.param == "tree":
        return Tree(top)
    tarball = tmp_path / "linux-1.0.tar"
    subprocess.run(["tar", "-cf", tarball, "-C", tmp_path, top.name], check=True)
    return Tarball(tarball)


def test_the_parts_that_fit_are_extracted_and_no_others(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    source.extract(["Makefile", "a/*.h", "a/b"], folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"Makefile", "a/top.h", "a/b/test.c", "a/b/lib/part.c"}


def test_a_part_that_is_not_there_is_named(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    with pytest.raises(HarnessError, match="a/nothing"):
        source.extract(["Makefile", "a/nothing"], folder)


def test_what_an_earlier_build_left_in_a_tree_is_not_taken_along(tmp_path: Path) -> None:
    tree, folder = tmp_path / "tree", tmp_path / "part"
    (tree / "a").mkdir(parents=True)
    for name in ("test.c", "test.o", "test.d"):
        (tree / "a" / name).touch()
    Tree(tree).extract(["a"], folder)
    assert [path.name for path in (folder / "a").iterdir()] == ["test.c"]
    assert len(list((tree / "a").iterdir())) == 3
