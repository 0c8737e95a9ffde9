"""Guests whose first process is the floor in C, and that do one live update."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.floors import BUILD, compile_floor
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import qemu

if TYPE_CHECKING:
    from pyluo.vm.machine.qemu import Machine

__all__ = ["OFF", "STARTED", "make_ramdisk", "make_ramdisk_with_kernel", "run"]

STARTED, OFF = "QEMU started", "QEMU ended"
_LIMIT = 120.0  # seconds without a mark


def make_ramdisk() -> Path:
    """Return the path of an initial ramdisk that has only the first process."""
    return _pack("init", {"init": compile_floor("init")})


def make_ramdisk_with_kernel(kernel: Path) -> Path:
    """Return the path of an initial ramdisk for a guest that needs nothing from the host.

    It has the first process, the next kernel, and the next kernel's ramdisk.

    Args:
        kernel: the image of the next kernel.
    """
    files = {"init": compile_floor("init"), "alone": Path(os.devnull)}
    files |= {"kernel": kernel, "initrd": _pack("alone", files)}
    return _pack(f"alone-{kernel.parent.name}", files)


def _pack(name: str, files: dict[str, Path]) -> Path:
    """Write an archive of files, by their names in it."""
    target = BUILD / f"{name}.cpio"
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        for each, source in files.items():
            shutil.copy(source, Path(folder, each))
        command = ["cpio", "--quiet", "--create", "--format", "newc", "--owner", "0:0"]
        with target.open("wb") as archive:
            words = "\n".join(files).encode()
            subprocess.run(command, cwd=folder, input=words, stdout=archive, check=True)
    return target


def run(machine: Machine, ramdisk: Path, *, by_serial: bool = False) -> dict[str, float]:
    """Boot a guest and wait for its end; return when each of its marks came, on the host's clock.

    Args:
        machine: the machine, as the harness has it for its own guests.
        ramdisk: the initial ramdisk.
        by_serial: whether the marks come over the serial line, from a guest that needs nothing
            else; by default they come by the harness's port.

    Raises:
        HarnessError: the guest did not get to its end.
    """
    if not by_serial:
        words = f"BENCH_KERNEL={machine.image} BENCH_INITRD={ramdisk}"
        machine = replace(machine, cmdline=f"{words} {machine.cmdline}")
    ours, theirs = socket.socketpair()
    marks, console = ("console", "control") if by_serial else ("control", "console")
    log = BUILD / "init.log"
    command = ["setpriv", "--pdeathsig", "KILL", "--", qemu.find_binary(), *machine.options()]
    command += ["-initrd", os.fspath(ramdisk)]
    command += ["-chardev", f"socket,id={marks},fd={theirs.fileno()}"]
    command += ["-chardev", f"file,id={console},path={log}"]
    for name in ("heart", "terminal", "qmp"):
        command += ["-chardev", f"null,id={name}"]
    seen = {STARTED: time.monotonic()}
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process, ours:
        theirs.close()
        ours.settimeout(_LIMIT)
        try:
            with ours.makefile(errors="replace") as lines:
                for line in lines:
                    _, is_mark, event = line.partition("mark: ")
                    if is_mark:
                        seen[event.strip()] = time.monotonic()
            process.wait(_LIMIT)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise HarnessError(
                f"the floor's guest hangs; its marks: {seen}", f"see {log}"
            ) from None
        finally:
            process.kill()
    seen[OFF] = time.monotonic()
    if "verified" not in seen:
        raise HarnessError(f"the floor's guest ended early; its marks: {seen}", f"see {log}")
    return seen
