"""Tests of how builds share the cache, with a fake kernel tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyluo.vm import HarnessError, Kernel


def start(tree: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pyluo", "vm", "kernel", "build", os.fspath(tree), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell makes its background jobs ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def count_compilations(tree: Path) -> int:
    log = tree.parent / "compilations"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_a_compilation(tree: Path, number: int = 1) -> None:
    deadline = time.monotonic() + 30
    while count_compilations(tree) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_builds_at_once_wait_for_each_other_and_compile_once(tree: Path) -> None:
    hold = tree.parent / "hold"
    hold.touch()
    first = start(tree)
    wait_for_a_compilation(tree)
    second = start(tree)
    assert second.stderr is not None
    assert "waiting for another build" in second.stderr.readline()
    hold.unlink()
    assert [run.wait() for run in (first, second)] == [0, 0]
    outputs = {run.communicate()[0] for run in (first, second)}
    assert len(outputs) == 1
    assert "Linux 7.9.9" in outputs.pop()
    assert count_compilations(tree) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_is_done_anew(tree: Path, number: signal.Signals) -> None:
    hold = tree.parent / "hold"
    hold.touch()
    interrupted = start(tree)
    wait_for_a_compilation(tree)
    interrupted.send_signal(number)
    interrupted.communicate(timeout=60)
    kernels = tree.parent / "cache" / "pyluo" / "kernels"
    assert [path for path in kernels.iterdir() if not path.name.startswith(".")] == []
    hold.unlink()
    again = start(tree)
    out, complaint = again.communicate(timeout=60)
    assert (again.returncode, count_compilations(tree)) == (0, 2), complaint
    assert "Linux 7.9.9" in out
    assert [path.name for path in kernels.iterdir() if path.name.startswith(".")] == []


def test_a_build_that_the_cache_has_needs_no_tools(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = start(tree)
    first.communicate()
    assert first.returncode == 0
    only_gcc = tmp_path / "bin"
    only_gcc.mkdir()
    for tool in ("gcc", "ld", "git"):
        (only_gcc / tool).symlink_to(f"/usr/bin/{tool}")
    monkeypatch.setenv("PATH", os.fspath(only_gcc))
    run = start(tree)
    assert run.communicate()[1] == ""
    assert (run.returncode, count_compilations(tree)) == (0, 1)


def test_what_a_tree_compiled_is_kept_for_its_next_build(tree: Path) -> None:
    start(tree).communicate(timeout=60)
    (objects_of_tree,) = (tree.parent / "cache" / "pyluo" / "objects").iterdir()
    (objects_of_tree / "of the first build").touch()
    (tree / "init.c").write_text("int changed;\n")
    again = start(tree)
    _, complaint = again.communicate(timeout=60)
    assert (again.returncode, count_compilations(tree)) == (0, 2), complaint
    assert [path.name for path in objects_of_tree.parent.iterdir()] == [objects_of_tree.name]
    assert (objects_of_tree / "of the first build").exists()


def test_other_options_are_another_kernel_with_objects_of_its_own(tree: Path) -> None:
    fragment = tree.parent / "my.config"
    fragment.write_text("# CONFIG_B is not set\n")
    images = set()
    for config in ([], ["--config", "CONFIG_A=y"], ["--config", os.fspath(fragment)]):
        run = start(tree, *config)
        out, complaint = run.communicate(timeout=60)
        assert run.returncode == 0, complaint
        images.add(out)
    assert (len(images), count_compilations(tree)) == (3, 3)
    assert len(list((tree.parent / "cache" / "pyluo" / "objects").iterdir())) == 3


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("CONFIG_LOST=y", "the configuration lost CONFIG_LOST=y (--config)"),
        ("CONFIG_", "the fragment CONFIG_ cannot be read"),
        ("nonsense.config", "nonsense.config, line 2, sets no option: CONFIG-A=y"),
        ("binary.config", "binary.config, line 1, sets no option: \\xff\\xfe"),
        ("missing.config", "the fragment missing.config cannot be read"),
    ],
)
def test_a_fragment_that_does_not_work_is_told(
    tree: Path, config: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    Path("nonsense.config").write_text("# a comment\nCONFIG-A=y\n")
    Path("binary.config").write_bytes(b"\xff\xfe")
    run = start(tree, "--config", config)
    assert complaint in run.communicate(timeout=60)[1]
    assert run.returncode == 69


def test_the_last_word_on_a_choice_wins_and_is_told(tree: Path) -> None:
    makefile = (tree / "Makefile").read_text()
    choice = "olddefconfig:\n\t@if grep -q B=y $(O)/.config; then sed -i /_A=y/d $(O)/.config; fi\n"
    (tree / "Makefile").write_text(makefile.replace("olddefconfig:\n", choice))
    run = start(tree, "--config", "CONFIG_A=y", "--config", "CONFIG_B=y")
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 0, told
    assert "CONFIG_A=y (--config): no longer so, because of a later fragment" in told
    run = start(tree, "--config", "CONFIG_B=y", "--config", "CONFIG_A=y")
    assert "the configuration lost CONFIG_A=y" in run.communicate(timeout=60)[1]
    assert run.returncode == 69


def test_an_option_that_should_be_a_module_is_built_in_and_told(tree: Path) -> None:
    fragment = tree.parent / "config"
    fragment.write_bytes(
        b"# caf\xe9\n  # indented\nCONFIG_A=m\nCONFIG_BARE\nCONFIG_C=y # why\nCONFIG_D=0X1F\r\n"
    )
    run = start(tree, "--config", os.fspath(fragment))
    out, told = run.communicate(timeout=60)
    assert run.returncode == 0, told
    assert f"CONFIG_A ({fragment}): y instead of m" in told
    assert "line 4, gives CONFIG_BARE no value: ignored" in told
    image = next(line.split()[-1] for line in out.splitlines() if line.endswith("bzImage"))
    settings = Path(image).with_name("config").read_text().splitlines()
    assert {"CONFIG_A=y", "CONFIG_C=y", "CONFIG_D=0X1F"} <= set(settings)


def test_the_objects_of_a_tree_that_is_gone_go_with_the_next_build(tree: Path) -> None:
    start(tree).communicate(timeout=60)
    moved = tree.rename(tree.parent / "moved")
    (moved / "init.c").write_text("int changed;\n")
    start(moved).communicate(timeout=60)
    objects = tree.parent / "cache" / "pyluo" / "objects"
    assert [(folder / "tree").read_text() for folder in objects.iterdir()] == [os.fspath(moved)]


def test_the_kernels_of_a_tree_go_once_nobody_asked_for_them_in_a_week(tree: Path) -> None:
    kernels = tree.parent / "cache" / "pyluo" / "kernels"

    def build(number: int) -> set[Path]:
        """Build with a number as an option; return the kernels that this adds to the cache."""
        before = set(kernels.glob("*"))
        run = start(tree, "--config", f"CONFIG_A={number}")
        _, complaint = run.communicate(timeout=60)
        assert run.returncode == 0, complaint
        return set(kernels.glob("*")) - before

    old = [build(number).pop() for number in range(3)]
    of_an_archive, asked_for, _ = old
    (of_an_archive / "tree").unlink()  # kernels from an archive have no such file
    eight_days_ago = time.time() - 8 * 24 * 3600
    for kernel in old:
        os.utime(kernel, (eight_days_ago, eight_days_ago))
    assert build(1) == set()
    new = build(3)
    assert set(kernels.glob("*")) == {of_an_archive, asked_for, *new}


def test_a_tarball_is_built_like_a_tree(tree: Path) -> None:
    tarball = tree.parent / "linux.tar.gz"
    # The fake tree writes beside itself; unpacked, that would be the build's scratch folder.
    makefile = (tree / "Makefile").read_text().replace("$(CURDIR)/..", os.fspath(tree.parent))
    (tree / "Makefile").write_text(makefile)
    subprocess.run(["tar", "-C", tree.parent, "-czf", tarball, tree.name], check=True)
    for times in (1, 2):
        run = start(tarball)
        out, complaint = run.communicate(timeout=60)
        assert (run.returncode, count_compilations(tree)) == (0, 1), (times, complaint)
        assert "Linux 7.9.9" in out
    assert not (tree.parent / "cache" / "pyluo" / "objects").exists()


@pytest.mark.parametrize("trace", [".config", "include/config", "arch/x86/include/generated"])
def test_a_tree_that_was_built_in_its_own_folder_is_told_with_the_way_out(
    tree: Path, trace: str
) -> None:
    (tree / trace).mkdir(parents=True)
    run = start(tree)
    assert "git worktree add" in run.communicate(timeout=60)[1]
    assert run.returncode == 69


def test_objects_that_a_build_was_killed_over_are_not_trusted(tree: Path) -> None:
    hold = tree.parent / "hold"
    start(tree).communicate(timeout=60)
    (objects_of_tree,) = (tree.parent / "cache" / "pyluo" / "objects").iterdir()
    (objects_of_tree / "cut short").touch()
    (tree / "init.c").write_text("int changed;\n")
    hold.touch()
    killed = start(tree)
    wait_for_a_compilation(tree, 2)
    killed.kill()
    killed.communicate(timeout=60)
    hold.unlink()
    assert start(tree).communicate(timeout=60)
    assert not (objects_of_tree / "cut short").exists()


def test_objects_outlive_a_build_that_fails_by_itself(tree: Path) -> None:
    start(tree).communicate(timeout=60)
    (objects_of_tree,) = (tree.parent / "cache" / "pyluo" / "objects").iterdir()
    (objects_of_tree / "complete").touch()
    for text in ("not C\n", "int repaired;\n"):
        (tree / "init.c").write_text(text)
        start(tree).communicate(timeout=60)
    assert (objects_of_tree / "complete").exists()
    assert count_compilations(tree) == 3


def test_the_key_that_a_build_makes_is_kept_with_the_kernel(tree: Path) -> None:
    assert Kernel.build(os.fspath(tree)).signing_key is None
    makefile = tree / "Makefile"
    text = makefile.read_text()
    make_key = "\t@mkdir -p $(O)/certs && echo secret > $(O)/certs/signing_key.pem\n"
    makefile.write_text(text.replace("bzImage:\n", f"bzImage:\n{make_key}"))
    key = Kernel.build(os.fspath(tree)).signing_key
    assert key is not None
    assert key.read_text() == "secret\n"


def test_a_build_with_signatures_needs_openssl(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyluo.vm.kernels.build._LIBSSL", tree / "no header")
    with pytest.raises(HarnessError, match="needs libssl-dev"):
        Kernel.build(os.fspath(tree), config=["CONFIG_MODULE_SIG=y"])
    Kernel.build(os.fspath(tree))
