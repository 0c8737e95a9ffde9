from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]

# The time of an example depends on the load of the machine more than on the code.
settings.register_profile("pyluo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyluo")

# The tests hand over a thousand descriptors, which both sides have open; the usual limit is 1024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(_hard, max(_soft, 4096)), _hard))

# The Makefile of a fake kernel tree, which is built in no time; its image does not boot.
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
    """The path of a fake kernel tree; the cache is empty."""
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
def run_interrupted(tree: Path) -> Callable[[list[str]], tuple[int, bytes]]:
    """A function that runs a command in the tree, and interrupts it once it makes `waiting` there.

    It returns the command's exit status and its output.
    """

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
                process.send_signal(signal.SIGINT)  # to this process only, as another program would
                # Waits for its pytest too, which has the pipes open.
                printed, _ = process.communicate(timeout=60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, printed

    return run


@pytest.fixture(params=["full", "gone"])
def broken_output(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that cannot be written: of a full disk, or of a pipe without a reader."""
    if request.param == "full":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    yield output
    os.close(output)
