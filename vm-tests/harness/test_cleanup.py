"""Check that no QEMU, socket or folder is left behind, however a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM = """
import signal, sys, threading
from pyluo.vm import VM
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
with VM() as vm:
    print(vm.pid, vm.console_log.parent, flush=True)
    threading.Event().wait()
"""

# Each test writes down its processes and its guest's folder, and waits: the first one forever, the
# second one until the file `go` exists.
TESTS = """
import os, pathlib, threading

def reach(vm, name):
    line = f"{os.getpid()} {vm.pid} {vm.console_log.parent}"
    part = pathlib.Path(f"{name}.part")
    part.write_text(line)
    part.rename(name)

def test_one(vm):
    reach(vm, "one")
    threading.Event().wait()
"""
SECOND = """

def test_two(vm):
    reach(vm, "two")
    while not pathlib.Path("go").exists():
        threading.Event().wait(0.05)
    assert vm.call(os.getpid)
"""
# A program that is killed right before or right after it starts the keeper, QEMU's parent.
DIES_EARLY = """
import os, signal, subprocess, sys
from pyluo.vm import VM

popen = subprocess.Popen

def start(*arguments, **keywords):
    if sys.argv[1] == "after":
        popen(*arguments, **keywords)
    os.kill(os.getpid(), signal.SIGKILL)

vm = VM()
subprocess.Popen = start
vm.__enter__()
"""
ASKS_FOR_KVM = """
from pyluo.vm.machine.accelerator import Choice
from pyluo.vm.machine.qemu import find_binary
Choice.make(find_binary())
"""
MARK = "PYLUO_TESTS_RUN"


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


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_outlives_a_pytest_that_is_killed(run: Run, workers: int) -> None:
    names = ["one", "two"][: workers or 1]
    pytest_itself = run.start_pytest(workers)
    guests = [run.wait_for_test(name) for name in names]
    assert {process.pid for process in guests} <= run.processes()
    assert len({process.pid for process in guests} - {pytest_itself.pid}) == workers
    assert all(is_qemu(process.qemu) for process in guests)
    assert run.folders() == {process.folder for process in guests}
    pytest_itself.kill()
    assert pytest_itself.wait() == -signal.SIGKILL
    wait_until(lambda: not run.processes() and not run.folders())
    assert run.sockets() == []


def test_a_worker_that_is_killed_takes_its_guest_along_and_no_other(run: Run) -> None:
    pytest_itself = run.start_pytest(2, "--max-worker-restart=0", "--pyluo-record=record")
    one, two = run.wait_for_test("one"), run.wait_for_test("two")
    os.kill(one.pid, signal.SIGKILL)
    wait_until(lambda: not is_qemu(one.qemu) and not one.folder.exists())
    assert is_qemu(two.qemu)
    Path(run.project, "go").touch()
    assert pytest_itself.wait(60) == pytest.ExitCode.TESTS_FAILED
    wait_until(lambda: not run.processes() and not run.folders())
    assert run.sockets() == []
    outcomes = {each.name.partition("::")[2]: each.outcome for each in json_lines.read(run.record)}
    assert outcomes == {"test_one": Outcome.NO_VERDICT, "test_two": Outcome.PASSED}


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_outlives_a_harness_that_is_killed_as_it_starts_a_guest(
    run: Run, when: str
) -> None:
    harness = run.start("-c", DIES_EARLY, when, PYLUO_ACCEL="tcg")
    assert harness.wait() == -signal.SIGKILL
    wait_until(lambda: not run.processes() and not run.folders())


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no /dev/kvm")
def test_the_guest_that_shows_whether_kvm_works_does_not_outlive_who_asks(run: Run) -> None:
    harness = run.start("-c", ASKS_FOR_KVM, XDG_CACHE_HOME=os.fspath(run.project))
    wait_until(lambda: bool(run.processes() - {harness.pid}) or harness.poll() is not None)
    if harness.poll() is not None:
        pytest.skip("it had its answer before it could be killed")
    harness.kill()
    harness.wait()
    wait_until(lambda: not run.processes() and not run.folders())


@dataclass(frozen=True)
class RunningTest:
    """A test that is running: the PIDs of its process and of its QEMU, and its guest's folder."""

    pid: int
    qemu: int
    folder: Path


class Run:
    """Programs, and all processes that they start: they have a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.project.mkdir()
        self.record = self.project / "record"
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a Python interpreter."""
        environment |= {MARK: self._mark, "TMPDIR": os.fspath(self._temporary)}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=self.project, env=os.environ | environment
        )
        self._started.append(process)
        return process

    def start_pytest(self, workers: int, *options: str) -> subprocess.Popen[bytes]:
        """Start pytest, with one test for each worker."""
        (self.project / "test_waits.py").write_text(TESTS + (SECOND if workers else ""))
        return self.start("-m", "pytest", "-n", str(workers), *options)

    def wait_for_test(self, name: str) -> RunningTest:
        """Wait until a test is running."""
        file = self.project / name
        wait_until(file.exists)
        pid, qemu, folder = file.read_text().split(maxsplit=2)
        return RunningTest(int(pid), int(qemu), Path(folder))

    def processes(self) -> set[int]:
        """Return the PIDs of the processes that are left, whatever their parents are by now."""
        return {int(each.name) for each in Path("/proc").glob("[0-9]*") if self._has_mark(each)}

    def folders(self) -> set[Path]:
        """Return what is left in the folder for temporary files, except pytest's own folders."""
        own = self._temporary.glob("pytest-of-*")
        return set(self._temporary.iterdir()) - set(own)

    def sockets(self) -> list[str]:
        """Return the Unix sockets that have a name in one of the run's folders, bound or stale."""
        top = os.fspath(self._temporary.parent)
        bound = [line for line in Path("/proc/net/unix").read_text().splitlines() if top in line]
        files = [path for path in Path(top).rglob("*") if path.is_socket()]
        return [*bound, *map(os.fspath, files)]

    def end(self) -> None:
        """Kill all processes, so that a failed test leaves none behind either."""
        for process in self._started:
            process.kill()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()

    def _has_mark(self, process: Path) -> bool:
        try:
            return f"{MARK}={self._mark}".encode() in (process / "environ").read_bytes()
        except OSError:  # the process is gone, or is another user's
            return False


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.end()


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
