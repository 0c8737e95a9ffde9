"""What is shown of long work, on a terminal and without one."""

from __future__ import annotations

import os
import subprocess
import sys

WORK = """
import time
from pyluo.vm import progress
with progress.status("booting [x]") as show:
    time.sleep(0.2)
    with progress.bar("compiling", 2) as move_bar:
        move_bar(1)
        time.sleep(0.2)
        progress.say("a line that stays")
    show("jumping")
    time.sleep(0.2)
print("done")
"""


def work(stderr: int) -> str:
    """Do the work with this stderr; return what it prints on stdout."""
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=stderr, text=True,
        env=environment, check=True,
    )  # fmt: skip
    return done.stdout


def test_on_a_terminal_what_is_being_done_is_shown_and_nothing_of_it_is_left() -> None:
    master, slave = os.openpty()
    assert work(slave) == "done\n"
    os.close(slave)
    shown = b""
    while chunk := read(master):
        shown += chunk
    os.close(master)
    for text in (b"booting [x]", b"compiling", b"jumping"):
        assert text in shown
    left = shown.rpartition(b"\x1b[2K")[2]  # behind the last line that was erased
    assert b"jumping" not in left
    assert b"booting" not in left
    assert b"a line that stays\r\n" in shown


def read(master: int) -> bytes:
    try:
        return os.read(master, 1 << 16)
    except OSError:  # nobody has the other end open
        return b""


def test_without_a_terminal_only_what_is_said_is_printed() -> None:
    reading, writing = os.pipe()
    assert work(writing) == "done\n"
    os.close(writing)
    with open(reading) as messages:
        assert messages.read() == "a line that stays\n"
