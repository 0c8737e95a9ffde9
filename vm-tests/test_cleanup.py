"""However a run ends, no QEMU, no socket and no folder stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = """
import signal, sys, threading
from pyluo.vm import VM
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
with VM() as vm:
    print(vm.pid, vm.console_log.parent, flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_run_that_is_ended_by(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid, folder = run.stdout.readline().decode().split()
        assert is_qemu(int(pid))
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert [path.name for path in Path(folder).iterdir() if path.is_socket()] == []
        run.send_signal(number)
    assert run.returncode != 0
    wait_until(lambda: not is_qemu(int(pid)) and not Path(folder).exists())


def test_qemu_does_not_outlive_its_keeper() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline().split()[0])
        keeper = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not is_qemu(pid))
        run.send_signal(signal.SIGINT)


def is_qemu(pid: int) -> bool:
    try:
        return b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
