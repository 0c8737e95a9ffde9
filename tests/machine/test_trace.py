"""Tests of reading traces, with a small program in place of a kernel with debug information."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Kernel
from pyluo.vm.machine.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """\
volatile int sink;
static inline __attribute__((always_inline)) void inner(void)
{
    sink++;
}
__attribute__((noinline)) void outer(void)
{
    inner();
    sink--;
}
int main(void)
{
    outer();
    return sink;
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    (folder / "init").mkdir()
    (folder / "init/main.c").write_text(SOURCE.replace("int main", "int start_kernel"))
    (folder / "entry.c").write_text("int start_kernel(void); int main() {return start_kernel();}")
    command = ["gcc", "-g", "-O1", "-no-pie", "-o", "vmlinux", "init/main.c", "entry.c"]
    subprocess.run(command, cwd=folder, check=True)
    symbols = subprocess.run(["nm", folder / "vmlinux"], capture_output=True, check=True, text=True)
    defined = [line for line in symbols.stdout.splitlines() if len(line.split()) == 3]
    (folder / "System.map").write_text("\n".join(defined))
    (folder / "config").write_text("CONFIG_DEBUG_INFO=y\n")
    return folder


def kernel(folder: Path, *, config: str = "config") -> Kernel:
    return Kernel(
        "k", "7", folder / "vmlinux", folder / config, folder / "System.map", folder / "vmlinux"
    )


def test_a_call_is_shown_with_its_line_and_not_the_one_after_it(folder: Path) -> None:
    command = ["objdump", "-d", "--disassemble=start_kernel", f"{folder}/vmlinux"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    (at,) = (number for number, line in enumerate(lines) if "call" in line and "outer" in line)
    start = next(int(line.split()[0], 16) for line in lines if "<start_kernel>:" in line)
    returns_to = int(lines[at + 1].split(":")[0], 16) - start
    (line,) = trace([f"[    1.000000]  start_kernel+{returns_to:#x}/0x20"], kernel(folder))
    assert line == f" start_kernel+{returns_to:#x}/0x20 (init/main.c:13)"


def test_an_inlined_place_is_shown_with_where_it_was_inlined(folder: Path) -> None:
    lines = trace(["[    1.000000] RIP: 0010:outer+0x0/0x20"], kernel(folder))
    assert lines == ("RIP: 0010:outer+0x0/0x20 (init/main.c:4 < init/main.c:8)",)


def test_without_debug_information_the_kernels_own_words_are_kept(folder: Path) -> None:
    (folder / "bare").write_text("CONFIG_DEBUG_INFO_NONE=y\n")
    lines = ["[    1.000000] RIP: 0010:outer+0x0/0x20"]
    assert trace(lines, kernel(folder, config="bare")) == ("RIP: 0010:outer+0x0/0x20",)
    assert trace(lines, Kernel("k", "7", folder)) == ("RIP: 0010:outer+0x0/0x20",)


def test_an_unknown_symbol_does_not_spoil_the_others(folder: Path) -> None:
    lines = trace(
        ["[    1.0]  nowhere+0x1/0x2 [module]", "[    1.0] RIP: 0010:outer+0x0/0x20"],
        kernel(folder),
    )
    assert lines[0] == " nowhere+0x1/0x2 [module]"
    assert "init/main.c:4" in lines[1]


def test_guesses_registers_and_code_are_left_out_and_headings_kept(folder: Path) -> None:
    text = """\
[    1.0] NMI backtrace for cpu 1
[    1.0] CPU: 1 UID: 0 PID: 1 Comm: a
[    1.0] Code: c7 45 98
[    1.0] RSP: 0018:ff3cbe97c0123df0 EFLAGS: 00000286
[    1.0]  ? guess+0x1/0x2
[    1.0][    T1]  outer+0x1/0x2
[    1.0] RIP: 0033:0x7f0b18681350"""
    assert trace(text.splitlines(), Kernel("k", "7", folder)) == (
        "NMI backtrace for cpu 1",
        "CPU: 1 UID: 0 PID: 1 Comm: a",
        " outer+0x1/0x2",
    )


@pytest.mark.parametrize("damage", ["gone", "torn", "no map"])
def test_a_trace_is_told_though_the_tree_was_cleaned(folder: Path, damage: str) -> None:
    copy = folder.with_name(f"{folder.name}-{damage.replace(' ', '-')}")
    shutil.copytree(folder, copy)
    cleaned = kernel(copy)
    if damage == "gone":
        shutil.rmtree(copy)
    elif damage == "torn":
        (copy / "vmlinux").write_bytes(b"\x7fELF")
    else:
        (copy / "System.map").write_text("not a map\n")
    lines = ["[    1.000000] Call Trace:", "[    1.000001]  start_kernel+0x5/0x20"]
    assert trace(lines, cleaned) == (" start_kernel+0x5/0x20",)
