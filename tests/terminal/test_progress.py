"""What is shown of long work, on a terminal and without one."""

from __future__ import annotations

import os
import subprocess
import sys

WORK = """
from pyluo.vm import progress
with progress.status("booting [x]") as show:
    with progress.bar("compiling", 2) as move_bar:
        move_bar(1)
        progress.say("a line that stays")
    show("jumping")
print("done")
"""


def work(stderr: int, other_end: int) -> bytes:
    """Do the work with this stderr; return what arrives at the other end of it."""
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", WORK]
    shown = b""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, env=environment
    ) as process:
        os.close(stderr)
        while chunk := read(other_end):
            shown += chunk
        os.close(other_end)
        assert process.communicate()[0] == b"done\n"
    assert process.returncode == 0
    return shown


def test_on_a_terminal_what_is_being_done_is_shown_and_nothing_of_it_is_left() -> None:
    master, slave = os.openpty()
    shown = work(slave, master)
    for text in (b"booting [x]", b"compiling", b"jumping"):
        assert text in shown
    left = shown.rpartition(b"\x1b[2K")[2]  # behind the last line that was erased
    assert b"jumping" not in left
    assert b"booting" not in left
    assert b"a line that stays\r\n" in shown


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # nobody has the other end open
        return b""


def test_without_a_terminal_only_what_is_said_is_printed() -> None:
    reading, writing = os.pipe()
    assert work(writing, reading) == b"a line that stays\n"
