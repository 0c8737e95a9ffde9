from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]

# How long an example takes says more of the machine's load than of the code.
settings.register_profile("pyluo", deadline=None)
settings.load_profile("pyluo")

# A thousand descriptors handed over are open on both sides, and what is usual is 1024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(_hard, max(_soft, 4096)), _hard))

# A kernel tree to all that builds one: it takes no time, and its image boots nowhere.
TREE = """
tinyconfig:
	@: > $(O)/.config
olddefconfig:
	@sed -i /CONFIG_LOST=/d $(O)/.config
bzImage:
	@echo compiled >> $(CURDIR)/../compilations
	@echo '  CC      init/main.o'
	@while [ -e $(CURDIR)/../hold ]; do sleep 0.05; done
	@if grep -q 'not C' init.c; then echo 'init.c: error: this is not C'; exit 1; fi
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
    """The path of such a tree; the cache is empty."""
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
    (folder / "init.c").touch()
    return folder


@pytest.fixture
def interrupted(tree: Path) -> Callable[[list[str]], tuple[int, bytes]]:
    """Runs a command in the tree, and interrupts it once one of its tests has made `waiting` there;
    its status, and what it printed."""

    def run(command: list[str]) -> tuple[int, bytes]:
        with subprocess.Popen(
            ["env", "--default-signal=INT", *command],
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                deadline = time.monotonic() + 60
                while not (tree / "waiting").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                process.send_signal(signal.SIGINT)  # it alone, as from another program
                # Its end is also that of pytest, which has the pipes too.
                printed, _ = process.communicate(timeout=60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, printed

    return run


@pytest.fixture(params=["full", "gone"])
def unprintable(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes no output: of a full disk, and of a pipe whose reader is gone."""
    if request.param == "full":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    yield output
    os.close(output)
