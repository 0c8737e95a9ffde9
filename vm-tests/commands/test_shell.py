"""Tests of `pyluo vm shell`, on a terminal and on pipes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import select
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Kernel
from pyluo.vm.terminal.shell import Shell
from tests.snippets import ROOT, command_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import VM

SHELL = [sys.executable, "-m", "pyluo", "vm", "shell"]
ESCAPE = "\x1d"
ROWS, COLUMNS = 31, 97
TIMEOUT = 120  # seconds to wait for output, or for the end of a process


class Terminal:
    """A terminal of the host on which `pyluo vm shell` runs."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.master, self.slave = os.openpty()
        self.resize(ROWS, COLUMNS)
        self.settings = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*SHELL, *arguments],
            stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env=os.environ | {"SHELL": "/bin/dash", "TERM": "vt220"} | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.unread = ""

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.master, (rows, columns))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until the pattern appears; consume it, and return the text before it."""
        while not (match := re.search(pattern, self.unread)):
            ready, _, _ = select.select([self.master], [], [], TIMEOUT)
            assert ready, f"no {pattern!r} in {self.unread!r}"
            self.unread += os.read(self.master, 1 << 16).decode(errors="replace")
        before, self.unread = self.unread[: match.start()], self.unread[match.end() :]
        return before

    def prompt(self, folder: str = ".*") -> None:
        """Wait for the next prompt of the guest's shell, and consume it."""
        self.expect(rf"guest:{folder}# $")

    def run(self, command: str) -> str:
        """Type a command, and return its output, up to the next prompt."""
        self.type(f"{command}\r")
        self.expect(re.escape(command) + "\r\n")
        return self.expect(r"guest:\S*# $")

    def wait(self) -> int:
        """Return the exit status, and check that the terminal's settings are restored."""
        status = self.process.wait(TIMEOUT)
        assert termios.tcgetattr(self.slave) == self.settings
        return status

    def qemu(self) -> int:
        """Return the process ID of QEMU."""
        keeper = _children(self.process.pid)
        (qemu,) = _children(*keeper)
        return qemu

    def hang_up(self) -> None:
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.master >= 0:
            os.close(self.master)
        os.close(self.slave)


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments, **environment)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Terminal]:
    """A terminal shared by tests that leave its shell at the prompt."""
    with terminal() as opened:
        opened.prompt(os.getcwd())
        yield opened


def test_what_is_typed_is_echoed_and_run(shared: Terminal) -> None:
    assert shared.run("echo $((6 * 7))") == "42\r\n"
    assert shared.run("tty") == "/dev/pts/0\r\n"


def test_the_hosts_shell_and_terminal_are_passed_on(shared: Terminal) -> None:
    assert shared.run("echo $0 $TERM") == "/bin/dash vt220\r\n"


def test_the_guest_has_a_name_for_prompts_to_show(shared: Terminal) -> None:
    assert shared.run("uname -n") == "guest\r\n"


def test_ctrl_c_ends_what_runs_in_the_guest_and_not_the_shell(shared: Terminal) -> None:
    shared.type("sh -c 'echo it; exec sleep 1000'\r")
    shared.expect("\r\nit\r\n")
    shared.type("\x03")
    shared.prompt()
    assert shared.run("echo $?") == "130\r\n"


def test_jobs_are_controlled(shared: Terminal) -> None:
    shared.type("sh -c 'echo it; exec sleep 1000'\r")
    shared.expect("\r\nit\r\n")
    shared.type("\x1a")
    shared.prompt()
    assert "Stopped" in shared.run("jobs")
    shared.type("fg\r")
    shared.expect("\r\nsh -c .*\r\n")
    shared.type("\x03")
    shared.prompt()


def test_the_size_of_the_window_arrives_and_so_does_a_change(shared: Terminal) -> None:
    assert shared.run("stty size") == f"{ROWS} {COLUMNS}\r\n"
    shared.type("sh -c 'trap \"stty size; exit\" WINCH; echo i''t; while sleep .1; do :; done'\r")
    shared.expect("\r\nit\r\n")
    shared.resize(ROWS + 1, COLUMNS - 1)
    shared.expect(f"{ROWS + 1} {COLUMNS - 1}\r\n")
    shared.prompt()
    shared.resize(ROWS, COLUMNS)


def test_the_escape_key_twice_goes_to_the_guest(shared: Terminal) -> None:
    shared.type(f"tr '\\035' '!' | sed 's/^/came: /'\rx{ESCAPE}{ESCAPE}y\r\x04")
    shared.expect("came: x!y\r\n")
    shared.prompt()


def test_help_is_shown_and_leaves_the_shell_alone(shared: Terminal) -> None:
    shared.type(f"{ESCAPE}?")
    shared.expect(r"\[Ctrl-\] u +live-update the guest\]\r\n")
    shared.expect(r"this text\]\r\n")
    assert shared.run("echo $((6 * 7))") == "42\r\n"


def test_a_large_paste_and_a_large_output_come_through(shared: Terminal) -> None:
    lines = "".join(f"{number:078d}\r" for number in range(500))
    shared.run("stty -echo")
    shared.type("sha256sum\r")
    rest = (lines + "\x04").encode()
    while rest:
        rest = rest[os.write(shared.master, rest[: 1 << 10]) :]
    shared.expect(hashlib.sha256(lines.replace("\r", "\n").encode()).hexdigest())
    shared.prompt()
    shared.type("stty echo\r")
    shared.prompt()
    output = shared.run("seq 50000")
    assert output.split() == [str(number) for number in range(1, 50001)]


def test_the_escape_key_live_updates_and_the_shell_goes_on_where_it_was() -> None:
    previous, stable = (Kernel.find(name).release for name in ("previous", "stable"))
    with terminal("--to", "previous") as guest:
        guest.expect(rf"\[life 1: Linux {re.escape(stable)}, 0 live updates; ")
        guest.prompt()
        guest.run("cd /usr/share")
        guest.type(f"{ESCAPE}u")
        guest.expect(
            rf"\r\n\[life 2: Linux {re.escape(previous)}, 1 live update, blackout \d+\.\d s\]\r\n"
        )
        guest.prompt("/usr/share")
        assert guest.run("uname -r") == f"{previous}\r\n"
        guest.type(f"{ESCAPE}uecho $((6 * 7))\r")  # typed before the jump is over
        guest.expect(rf"\r\n\[life 3: Linux {re.escape(stable)}, 2 live updates, ")
        guest.expect(r"[\n ]42\r\n")
        guest.prompt("/usr/share")
        guest.type("exit 7\r")
        assert guest.wait() == 7


def test_a_jump_that_is_typed_is_noticed_and_the_shell_goes_on_where_it_was() -> None:
    kernel = Kernel.find("stable")
    with terminal() as guest:
        guest.prompt()
        load = f"pyluo kexec load {kernel.image} --reuse-cmdline"
        guest.type(f"cd /usr/share && {load} && pyluo kexec reboot\r")
        guest.expect(
            rf"\r\n\[life 2: Linux {re.escape(kernel.release)}, 1 live update, "
            rf"blackout \d+\.\d s\]\r\n"
        )
        guest.prompt("/usr/share")
        assert guest.run("stty size") == f"{ROWS} {COLUMNS}\r\n"
        guest.type(f"{ESCAPE}u")
        guest.expect(r"\[life 3: .*, 2 live updates, ")
        guest.prompt("/usr/share")
        guest.type("exit\r")
        assert guest.wait() == 0


def test_a_folder_that_the_next_life_has_not_is_missed() -> None:
    with terminal() as guest:
        guest.prompt()
        guest.run("mkdir /tmp/gone && cd /tmp/gone")
        guest.type(f"{ESCAPE}u")
        guest.expect(r"\[life 2: ")
        guest.expect("pyluo: /tmp/gone: No such file or directory\r\n")
        guest.prompt(os.getcwd())


def test_a_jump_that_is_refused_is_told_and_the_shell_goes_on() -> None:
    with terminal() as guest:
        guest.prompt()
        guest.run("mark=$((6 * 7)); echo 1 > /proc/sys/kernel/kexec_load_disabled")
        guest.type(f"{ESCAPE}u")
        guest.expect(r"\r\n\[refused: kexec_file_load.*\]\r\n")
        guest.type("echo $mark\r")
        guest.expect("\r\n42\r\n")
        guest.prompt()
        guest.type(f"{ESCAPE}qand more")
        assert guest.wait() == 0


def test_a_crash_is_told_and_gives_the_terminal_back() -> None:
    with terminal() as guest:
        guest.prompt()
        guest.type("echo c > /proc/sysrq-trigger\r")
        guest.expect(r"pyluo: kernel panic: sysrq triggered crash \(kernel stable, life 1\)")
        assert guest.wait() == 1


def test_a_signal_gives_the_terminal_back_and_leaves_no_guest_behind() -> None:
    with terminal() as guest:
        guest.prompt()
        qemu = guest.qemu()
        guest.process.send_signal(signal.SIGTERM)
        assert guest.wait() == 128 + signal.SIGTERM
        assert not Path(f"/proc/{qemu}").exists()


def test_a_terminal_that_hangs_up_leaves_no_guest_behind() -> None:
    with terminal() as guest:
        guest.prompt()
        qemu = guest.qemu()
        guest.hang_up()
        assert guest.process.wait(TIMEOUT) == 128 + signal.SIGHUP
        assert not Path(f"/proc/{qemu}").exists()


def test_the_escape_key_ends_a_guest_that_answers_no_more() -> None:
    with terminal() as guest:
        guest.prompt()
        qemu = guest.qemu()
        guest.run("kill -STOP $(ps -o ppid= $PPID)")  # the worker; the terminal is its child's
        guest.type(f"{ESCAPE}u{ESCAPE}q")
        assert guest.wait() == 0
        assert not Path(f"/proc/{qemu}").exists()


@pytest.mark.parametrize(
    ("command", "status"), [(["sh", "-c", "kill -9 $$"], 137), (["/no/program"], 127)]
)
def test_the_status_of_another_program_is_passed_on(command: list[str], status: int) -> None:
    with terminal("--", *command) as guest:
        assert guest.wait() == status


def test_a_pipe_is_a_script() -> None:
    done = run_script("uname -r; echo $0; echo oops >&2\ncat\nread\nexit 5\n", SHELL="/no/shell")
    kernel = Kernel.find("stable")
    assert done.stdout.decode() == f"{kernel.release}\n/bin/sh\nread\nexit 5\n"
    assert (done.stderr, done.returncode) == (b"oops\n", 0)


def test_the_status_of_a_script_is_passed_on() -> None:
    done = run_script("exit 5\necho not me\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 5)


@pytest.mark.parametrize("shell", ["/bin/dash", "/bin/bash"])
def test_a_script_goes_on_in_the_next_life_after_the_line_that_jumped(shell: str) -> None:
    _, shown, load, reboot = command_lines(ROOT / "docs/guides/terminal.md")
    assert shown == "pyluo vm shell <<'EOF'"
    load = load.replace("~/bzImage", os.fspath(Kernel.find("stable").image))
    lines = ["cd /usr/share", "echo before", load, reboot, "echo after", "pwd", "exit 6"]
    done = run_script("\n".join(lines), SHELL=shell)
    assert done.stdout.decode().splitlines() == ["before", "after", "/usr/share"]
    assert done.returncode == 6
    assert done.stderr.startswith(b"[life 2: Linux ")


def test_one_shell_after_another_runs_in_a_guest(shared_vm: VM, tmp_path: Path) -> None:
    for number in range(10):
        with (
            open(os.devnull, "rb") as nothing,
            open(tmp_path / str(number), "w+b") as out,
        ):
            files = {"stdin": nothing.fileno(), "stdout": out.fileno(), "stderr": out.fileno()}
            shell = Shell(shared_vm, ["sh", "-c", f"echo {number}; exit {number}"], **files)
            assert shell.run() == number
            assert os.pread(out.fileno(), 100, 0) == b"%d\n" % number


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        SHELL,
        input=script.encode(),
        capture_output=True,
        timeout=TIMEOUT,
        env=os.environ | {"SHELL": "/bin/dash"} | environment,
    )


def _children(*parents: int) -> list[int]:
    found = [
        Path(f"/proc/{parent}/task/{task}/children").read_text().split()
        for parent in parents
        for task in os.listdir(f"/proc/{parent}/task")
    ]
    return [int(pid) for pids in found for pid in pids]
