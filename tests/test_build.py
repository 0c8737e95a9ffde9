"""How builds share the cache: the tree is a few lines of make, and the test is who runs it when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TREE = """
tinyconfig:
	@: > $(O)/.config
olddefconfig:
	@:
bzImage:
	@echo compiled >> $(CURDIR)/../compilations
	@echo '  CC      init/main.o'
	@while [ -e $(CURDIR)/../hold ]; do sleep 0.05; done
	@mkdir -p $(O)/arch/x86/boot
	@cp $(CURDIR)/../image $(O)/arch/x86/boot/bzImage
	@touch $(O)/System.map
vmlinux:
	@touch $(O)/vmlinux
headers_install:
	@mkdir -p $(INSTALL_HDR_PATH)/include/linux
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x300).to_bytes(2, "little")
    image[0x500:0x510] = b"7.9.9 (builder)\0"
    (tmp_path / "image").write_bytes(image)
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "Makefile").write_text(TREE)
    (folder / "Kbuild").touch()
    return folder


def start(tree: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pyluo", "vm", "kernel", "build", os.fspath(tree)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def compilations(tree: Path) -> int:
    log = tree.parent / "compilations"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_a_compilation(tree: Path) -> None:
    deadline = time.monotonic() + 30
    while not compilations(tree):
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
    told = {run.communicate()[0] for run in (first, second)}
    assert len(told) == 1
    assert "Linux 7.9.9" in told.pop()
    assert compilations(tree) == 1


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
    assert (again.returncode, compilations(tree)) == (0, 2), complaint
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
    for tool in ("gcc", "git"):
        (only_gcc / tool).symlink_to(f"/usr/bin/{tool}")
    monkeypatch.setenv("PATH", os.fspath(only_gcc))
    run = start(tree)
    assert run.communicate()[1] == ""
    assert (run.returncode, compilations(tree)) == (0, 1)
