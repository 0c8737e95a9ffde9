"""One QEMU process: its command line, its life, its end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyluo.guest import port
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import keeper
from pyluo.vm.machine.accelerator import Accelerator

__all__ = ["BINARY", "Machine", "QemuProcess", "find_binary"]

BINARY = "qemu-system-x86_64"
_CHANNELS = ("control", "heart", "terminal", "qmp")
_CONSOLE_ROOM = 1 << 20  # bytes, as much as Linux lets anyone have
_PROCESSOR = {
    # The interrupt remapping of intel-iommu needs the split irqchip.
    Accelerator.KVM: ["-machine", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", "host"],
    # A kexec leaves translations in every page that held code. While they last, each store to such
    # a page takes the slow path: with QEMU 7.2's 1 GiB of translations a jump took 3.5 to 8 s,
    # with 32 MiB, which are flushed about once a life, 2.5 s. Without ERMS the kernel clears pages
    # by eight bytes at a time, not by one, which is a tenth of a jump.
    Accelerator.TCG: ["-machine", "q35", "-accel", "tcg,tb-size=32", "-cpu", "max,erms=off"],
}


def find_binary() -> str:
    """The path of QEMU.

    Raises:
        HarnessError: it is not installed.
    """
    path = shutil.which(BINARY)
    if path is None:
        raise HarnessError(f"{BINARY} is not installed", "install it: apt install qemu-system-x86")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What QEMU is to emulate.

    Attributes:
        image: the kernel.
        cmdline: its command line.
        accelerator: what runs the guest's instructions.
        memory: in bytes.
        cpus: how many.
        devices: values of further ``-device`` options.
        network: whether the guest has an interface; it reaches nothing but QEMU itself.
    """

    image: Path
    cmdline: str
    accelerator: Accelerator
    memory: int
    cpus: int
    devices: tuple[str, ...]
    network: bool

    def options(self) -> list[str]:
        """QEMU's options for it, but for what the channels need."""
        options = [
            "-nodefaults", "-no-user-config", "-display", "none",
            *_PROCESSOR[self.accelerator],
            "-m", f"size={self.memory >> 10}K",
            "-smp", str(self.cpus),
            "-kernel", os.fspath(self.image),
            "-append", self.cmdline,
            # A panic is told by QMP; the kernel goes on and finishes its trace on the console.
            "-device", "pvpanic-pci",
            "-action", "panic=none",
            "-no-reboot",
            # A kernel with CONFIG_FW_CFG_SYSFS tells by it where things are, for a dump.
            "-device", "vmcoreinfo",
            "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device", "virtio-9p-pci,fsdev=root,mount_tag=/dev/root",
            "-object", "rng-random,id=rng,filename=/dev/urandom",
            "-device", "virtio-rng-pci,rng=rng",
            "-device", "virtio-serial-pci",
            "-device", f"virtserialport,chardev=control,name={port.CONTROL}",
            "-device", f"virtserialport,chardev=heart,name={port.HEARTBEAT}",
            "-device", f"virtserialport,chardev=terminal,name={port.TERMINAL}",
            "-device", "isa-serial,chardev=console",
            "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        if self.network:
            options += [
                "-netdev",
                "user,id=net,restrict=on",
                "-device",
                "virtio-net-pci,netdev=net",
            ]
        for device in self.devices:
            options += ["-device", device]
        return options


class QemuProcess:
    """QEMU under its keeper, with a socket for each channel.

    The sockets have no names. The console is a pipe: the guest's UART writes it byte by byte, and a
    socket, which counts its buffer by messages, would be full after some 300 of them; what does
    not fit is lost in the middle of a line. The folder, mode 0700, holds the console's log and
    QEMU's own messages; the keeper makes and removes it.

    Attributes:
        folder: that folder.
        console: the end of the console's pipe to read from.
        sockets: one for each of control, heart, terminal and qmp.
        pid: the process id of QEMU.
    """

    def __init__(self, machine: Machine) -> None:
        binary = find_binary()
        self.folder = Path(tempfile.gettempdir(), f"pyluo-{secrets.token_hex(8)}")
        self._alive = self._status = -1
        self.sockets: dict[str, socket.socket] = {}
        theirs: list[socket.socket] = []
        command = [binary, *machine.options()]
        for name in _CHANNELS:
            self.sockets[name], other = socket.socketpair()
            theirs.append(other)
            command += ["-chardev", f"socket,id={name},fd={other.fileno()}"]
        console, written = os.pipe()
        with suppress(OSError):  # the user may have many pipes
            fcntl.fcntl(written, fcntl.F_SETPIPE_SZ, _CONSOLE_ROOM)
        self.console = os.fdopen(console, "rb", buffering=0)
        path = f"/dev/fd/{written},logfile={_escape(self.console_log)}"
        command += ["-chardev", f"file,id=console,path={path}"]
        alive, self._alive = os.pipe()
        self._status, status = os.pipe()
        fds = [alive, status, written, *(other.fileno() for other in theirs)]
        try:
            self._keeper = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    keeper.__file__,
                    os.fspath(self.folder),
                    str(alive),
                    str(status),
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,
            )
        except BaseException:
            self._close_channels()
            raise
        finally:
            os.close(alive)
            os.close(status)
            os.close(written)
            for other in theirs:
                other.close()
        self.pid = 0
        self._reports: asyncio.StreamReader | None = None

    @property
    def console_log(self) -> Path:
        """All that came over the serial line, as QEMU wrote it down."""
        return self.folder / "console.log"

    @property
    def messages_log(self) -> Path:
        """What QEMU itself had to say."""
        return self.folder / keeper.MESSAGES

    async def started(self) -> None:
        """Waits for the process id."""
        self._reports = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reports),  # type: ignore[arg-type]
            os.fdopen(self._status, "rb"),
        )
        self._status = -1
        report = (await self._reports.readline()).decode().strip()
        if not report.isdecimal():
            raise HarnessError("QEMU's keeper did not start", report or "it gave no reason")
        self.pid = int(report)

    async def ended(self) -> int:
        """Waits for QEMU's end; its exit status, or the negative number of a signal."""
        assert self._reports is not None
        return int(await self._reports.readline() or -9)

    def close(self) -> None:
        """Ends QEMU if it still runs, and removes the folder; a second time does nothing."""
        self._close_channels()
        self._keeper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # if the keeper was killed

    def _close_channels(self) -> None:
        self.console.close()
        for channel in self.sockets.values():
            channel.close()
        if self._alive >= 0:
            # A byte, since a forked child of this process may hold the pipe open.
            with suppress(BrokenPipeError):
                os.write(self._alive, b"\n")
        for fd in (self._alive, self._status):
            if fd >= 0:
                os.close(fd)
        self._alive = self._status = -1


def _escape(path: Path) -> str:
    """A path inside a QEMU option, where a comma ends the value."""
    return os.fspath(path).replace(",", ",,")
