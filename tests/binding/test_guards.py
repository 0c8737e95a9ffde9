"""Tests of pyluo's own checks, as far as they need no kernel with LUO."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pyluo import Memfd, PreservedMemoryError, guards
from pyluo._sys import Files, look, read_small_file

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def test_files_are_looked_at_in_one_call_and_holes_and_pages_are_counted(tmp_path: Path) -> None:
    with (
        Memfd.create("holes", 10 * PAGE) as holes,
        Memfd.create("full", 3 * PAGE) as full,
        Memfd.create("odd", PAGE + 1) as odd,
        Memfd.create("empty", 0) as empty,
        open(os.devnull) as device,
        (tmp_path / "file").open("w+b") as closed,
    ):
        holes.write(b"x", 4 * PAGE)
        full.write(b"x" * 3 * PAGE, 0)
        fds = [holes.fileno(), full.fileno(), odd.fileno(), empty.fileno(), device.fileno()]
        unused = closed.fileno()
        closed.close()
        assert look([]) == Files(0, 0, 0, None)
        assert look(fds[:1]) == Files(10 * PAGE, 9 * PAGE, 10 * PAGE, None)
        assert look(fds[1:2]) == Files(3 * PAGE, 0, 3 * PAGE, None)
        assert look(fds[2:3]) == Files(2 * PAGE, 2 * PAGE, 2 * PAGE, None)
        # What the kernel refuses anyway counts as empty.
        assert look([*fds[3:], unused, -1]) == Files(0, 0, 0, None)
        assert look([*fds, unused]) == Files(15 * PAGE, 11 * PAGE, 10 * PAGE, None)


def test_the_first_file_that_is_sealed_noexec_is_found() -> None:
    with (
        Memfd.create("usual", PAGE) as usual,
        Memfd.create("noexec", PAGE, executable=False) as noexec,
    ):
        assert look([usual.fileno(), noexec.fileno(), noexec.fileno()]).noexec == 1
        assert look([usual.fileno()]).noexec is None
        assert guards.MemoryDemand().add([noexec.fileno(), usual.fileno()]) == 0


# Looks at a memfd where fstat(2) is refused, as a security module may do.
LOOK_WITHOUT_FSTAT = """
import ctypes, struct
from pyluo import Memfd, RequestError
from pyluo._sys import look

LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
FSTAT, EACCES = 5, 13
ERRNO, ALLOW = 0x00050000, 0x7FFF0000
program = b"".join(struct.pack("HBBI", *each) for each in (
    (LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, FSTAT), (RETURN, 0, 0, ERRNO | EACCES),
    (RETURN, 0, 0, ALLOW)))

class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]

prctl = ctypes.CDLL(None).prctl
with Memfd.create("ram", 4096) as ram:
    assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, ctypes.byref(Filter(4, program))) == 0  # PR_SET_SECCOMP, a filter
    try:
        print(look([0, ram.fileno()]))
    except RequestError as error:
        print(error.errno, error.subject == f"descriptor {ram.fileno()}")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter has a number of x86-64")
def test_a_file_that_cannot_be_looked_at_is_not_taken_for_an_empty_one() -> None:
    command = [sys.executable, "-c", LOOK_WITHOUT_FSTAT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{errno.EACCES} True\n", "")


def test_small_files_are_read_and_missing_ones_have_no_text(tmp_path: Path) -> None:
    file = tmp_path / "name-\udcff"
    assert read_small_file(str(file)) == read_small_file(str(tmp_path)) == ""
    file.write_bytes(b"/caf\xe9/\xc3\xa9\n")
    text = read_small_file(str(file))
    assert os.fsencode(text) == b"/caf\xe9/\xc3\xa9\n"
    file.write_bytes(b"x" * (1 << 17))
    assert read_small_file(str(file)) == "x" * (1 << 16)
    assert read_small_file("/proc/self/cgroup") == Path("/proc/self/cgroup").read_text()


def test_a_limit_that_was_set_just_now_counts_for_the_next_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"/proc/self/cgroup": "0::/small", "memory.max": "max", "memory.current": "0"}
    monkeypatch.setattr(
        guards, "read_small_file", lambda path: files.get(path) or files[Path(path).name]
    )
    monkeypatch.setattr(guards, "_reclaimable", lambda path: 0)
    monkeypatch.setattr(guards, "_read_meminfo", lambda: {"MemTotal": 9 * MIB, "MemFree": MIB})
    for size in (None, 1 << 60):
        guards.refuse_full_cgroup(size, lambda: "a file")
    files["memory.max"] = str(7 * MIB)
    guards.refuse_full_cgroup(7 * MIB, lambda: "a file")
    with pytest.raises(PreservedMemoryError, match="the memory cgroup /small has room for 7 MiB"):
        guards.refuse_full_cgroup(8 * MIB, lambda: "a file")
    with pytest.raises(PreservedMemoryError, match=r"possibly 8 MiB.*say how large it is"):
        guards.refuse_full_cgroup(None, lambda: "a file")
    guards.refuse_full_cgroup(0, lambda: "a file that was retrieved before")


def test_where_no_cgroup_has_a_limit_the_memory_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []

    def read(path: str) -> str:
        looks.append(path)
        return "1:name=systemd:/x\n0::/a/b\n" if path == "/proc/self/cgroup" else "max\n"

    monkeypatch.setattr(guards, "read_small_file", read)
    monkeypatch.setattr(guards, "_read_meminfo", lambda: pytest.fail("it was looked at"))
    guards.refuse_full_cgroup(None, lambda: "a file")
    limits = [f"/sys/fs/cgroup{group}/memory.max" for group in ("/a/b", "/a", "/")]
    assert looks == ["/proc/self/cgroup", *limits]
