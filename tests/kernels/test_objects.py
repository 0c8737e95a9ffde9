"""Tests that no object of an earlier build becomes a part of a kernel that was made of other files.

The Makefile of the fake tree compares times, as kbuild does, and copies sources instead of
compiling them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pyluo.vm.kernels.source import Tree
from tests.kernels.test_build import count_compilations, start, wait_for_a_compilation

OLD = 1_000_000_000  # seconds: a time before all builds
MAKEFILE = """
tinyconfig:
	@: > $(O)/.config
olddefconfig:
bzImage: $(O)/init.o $(O)/other.o
	@test -e $(O)/init.o -a -e $(O)/other.o
	@mkdir -p $(O)/arch/x86/boot
	@cat $(CURDIR)/../image $(O)/init.o $(O)/other.o > $(O)/arch/x86/boot/bzImage
	@touch $(O)/System.map
$(O)/%.o: $(CURDIR)/%.c $(CURDIR)/include/top.h
	@cat $^ > $@.read
	@echo $* >> $(CURDIR)/../compilations
	@while [ -e $(CURDIR)/../hold ]; do sleep 0.02; done
	@echo 'deps_$*.o := $(CURDIR)/include/lib/../../$*.c $(CURDIR)/include/top.h' > $(O)/.$*.o.cmd
	@cat $@.read > $@
vmlinux:
	@touch $(O)/vmlinux
headers_install:
	@mkdir -p $(INSTALL_HDR_PATH)/include
"""


@pytest.fixture
def tree(tree: Path) -> Path:
    (tree / "Makefile").write_text(MAKEFILE)
    (tree / "include").mkdir()
    for name in ("init.c", "other.c", "include/top.h", "include/lib/part.h"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(f"the first {name}\n")
        os.utime(tree / name, (OLD, OLD))
    return tree


def build(tree: Path) -> bytes:
    """Build the tree, and return the image."""
    run = start(tree)
    out, complaint = run.communicate(timeout=60)
    assert run.returncode == 0, complaint
    (line,) = (line for line in out.splitlines() if line.endswith("bzImage"))
    return Path(line.split()[-1]).read_bytes()


def test_a_tree_with_older_files_in_the_place_of_another_is_compiled(tree: Path) -> None:
    build(tree)
    copy = tree.with_name("copy")
    shutil.copytree(tree, copy)
    (copy / "init.c").write_text("another one\n")
    os.utime(copy / "init.c", (OLD - 5, OLD - 5))
    tree.rename(tree.with_name("away"))
    copy.rename(tree)
    assert b"another one\n" in build(tree)


@pytest.mark.parametrize("name", ["init.c", "include/top.h"])
def test_a_file_with_an_old_time_in_the_place_of_another_is_compiled(tree: Path, name: str) -> None:
    build(tree)
    (tree / "new").write_text("another one\n")
    os.utime(tree / "new", (OLD, OLD))
    (tree / "new").rename(tree / name)
    assert b"another one\n" in build(tree)
    assert count_compilations(tree) == (3 if name == "init.c" else 4)


def test_a_file_that_is_gone_leaves_no_object(tree: Path) -> None:
    """Without a source, make would take the object for up to date."""
    build(tree)
    (tree / "other.c").unlink()
    run = start(tree)
    complaint = run.communicate(timeout=60)[1]
    assert run.returncode == 69
    assert "other.o" in complaint


def test_a_file_that_was_edited_while_it_was_compiled_is_compiled_again(tree: Path) -> None:
    hold = tree.parent / "hold"
    hold.touch()
    run = start(tree)
    wait_for_a_compilation(tree)
    (tree / "init.c").write_text("another one\n")
    hold.unlink()
    assert "changed while it was built: build it again" in run.communicate(timeout=60)[1]
    assert b"another one\n" in build(tree)
    log = (tree.parent / "compilations").read_text().split()
    assert sorted(log) == ["init", "init", "other"]


def test_an_edit_that_was_undone_while_it_was_compiled_is_told(tree: Path) -> None:
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", tree, *words])
    build(tree)
    text = (tree / "init.c").read_text()
    (tree / "init.c").write_text("an edit\n")
    hold = tree.parent / "hold"
    hold.touch()
    run = start(tree)
    wait_for_a_compilation(tree, 3)
    (tree / "init.c").write_text("another edit\n")
    (tree / "init.c").write_text("an edit\n")
    hold.unlink()
    assert "changed while it was built" in run.communicate(timeout=60)[1]
    (tree / "init.c").write_text(text)
    assert text.encode() in build(tree)


def test_an_edit_while_another_build_is_waited_for_is_a_part_of_the_kernel(tree: Path) -> None:
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", tree, *words])
    other, hold = tree.with_name("other"), tree.parent / "hold"
    shutil.copytree(tree, other)
    (other / "init.c").write_text("another tree\n")
    hold.touch()
    first = start(other)
    wait_for_a_compilation(tree)
    second = start(tree)
    assert second.stderr is not None
    assert "waiting for another build" in second.stderr.readline()
    text = (tree / "init.c").read_text()
    (tree / "init.c").write_text("an edit\n")
    hold.unlink()
    for run in (first, second):
        _, complaint = run.communicate(timeout=60)
        assert run.returncode == 0, complaint
    assert b"an edit\n" in build(tree)
    (tree / "init.c").write_text(text)
    assert text.encode() in build(tree)


def test_a_new_header_that_hides_another_has_all_compiled(tree: Path) -> None:
    build(tree)
    (tree / "include" / "part.h").write_text("of the same name\n")
    build(tree)
    assert count_compilations(tree) == 4


def test_a_file_that_kbuild_keeps_no_record_of_has_all_compiled(tree: Path) -> None:
    (tree / "Kconfig").touch()
    build(tree)
    (tree / "new").write_text("config A\n")
    os.utime(tree / "new", (OLD, OLD))
    (tree / "new").rename(tree / "Kconfig")
    build(tree)
    assert count_compilations(tree) == 4


def test_an_edit_has_only_its_own_object_compiled(tree: Path) -> None:
    build(tree)
    (tree / "init.c").write_text("another one\n")
    (tree / "new.c").touch()
    (tree / ".init.c.swp").touch()
    assert b"another one\n" in build(tree)
    assert count_compilations(tree) == 3


def test_an_editors_files_change_nothing(tree: Path) -> None:
    build(tree)
    for name in (".init.c.swp", "init.c~", "init.c.orig", "cscope.out"):
        (tree / name).touch()
    build(tree)
    assert count_compilations(tree) == 2


class TestIdentity:
    """Of a git checkout."""

    @pytest.fixture
    def tree(self, tree: Path) -> Path:
        (tree / ".gitignore").write_text("*.h\n.*\n")
        self.git(tree, "init", "--quiet")
        self.git(tree, "add", "init.c", "other.c", "Makefile", "Kbuild")
        self.git(tree, "commit", "--quiet", "--message", "first")
        return tree

    @staticmethod
    def git(tree: Path, *words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", tree, *identity, *words], check=True)

    def test_a_file_that_git_ignores_is_a_part_of_it(self, tree: Path) -> None:
        before = Tree(tree).identity
        (tree / "include" / "top.h").write_text("another one\n")
        assert Tree(tree).identity != before

    @pytest.mark.parametrize("option", ["--assume-unchanged", "--skip-worktree"])
    def test_a_file_that_git_was_told_not_to_look_at_is_a_part_of_it(
        self, tree: Path, option: str
    ) -> None:
        self.git(tree, "update-index", option, "init.c")
        before = Tree(tree).identity
        (tree / "init.c").write_text("another one\n")
        assert Tree(tree).identity != before

    def test_the_repository_of_a_hook_is_not_taken_for_the_trees(
        self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = Tree(tree).identity
        other = tmp_path / "other"
        other.mkdir()
        (other / "a").touch()
        self.git(other, "init", "--quiet")
        self.git(other, "add", "a")
        self.git(other, "commit", "--quiet", "--message", "other")
        monkeypatch.setenv("GIT_DIR", os.fspath(other / ".git"))
        monkeypatch.setenv("GIT_WORK_TREE", os.fspath(other))
        monkeypatch.setenv("GIT_INDEX_FILE", os.fspath(other / ".git" / "index"))
        assert Tree(tree).identity == before

    def test_the_same_content_is_the_same_tree(self, tree: Path, tmp_path: Path) -> None:
        copy = tmp_path / "clone"
        subprocess.run(["git", "clone", "--quiet", tree, copy], check=True)
        for name in ("include", ".gitignore"):
            path = tree / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert Tree(tree).identity == Tree(copy).identity


def test_a_file_whose_time_was_set_back_makes_a_folder_another_tree(tree: Path) -> None:
    before = Tree(tree).identity
    stat = (tree / "init.c").stat()
    (tree / "init.c").write_text("THE FIRST init.c\n")
    os.utime(tree / "init.c", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Tree(tree).identity != before
