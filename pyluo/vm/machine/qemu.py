"""A QEMU process: its command line, its start and its end."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.guest import port
from pyluo.memfd import Memfd
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import keeper
from pyluo.vm.machine.accelerator import Accelerator
from pyluo.vm.packages import how_to_install

if TYPE_CHECKING:
    import io
    from collections.abc import Mapping

__all__ = ["BINARY", "Machine", "QemuProcess", "find_binary", "nests", "version"]

BINARY = "qemu-system-x86_64"
_CHANNELS = ("control", "heart", "terminal", "qmp")
_CONSOLE_BUFFER = 1 << 20  # bytes, the most that Linux allows an unprivileged user


def find_binary() -> str:
    """Return the path of QEMU.

    Raises:
        HarnessError: QEMU is not installed, or this host is no x86-64 machine.
    """
    if platform.machine() != "x86_64":
        raise HarnessError(
            f"this host is an {platform.machine()} machine",
            "guests run the host's own programs on an x86-64 kernel: use an x86-64 host",
        )
    path = shutil.which(BINARY)
    if path is None:
        raise HarnessError(f"{BINARY} is not installed", how_to_install(["qemu-system-x86"]))
    return path


def version(qemu: str) -> str:
    """Return the first line of `qemu --version`: its name and version.

    Raises:
        HarnessError: QEMU does not run.
    """
    done = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError(
            f"{qemu} --version ended with status {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout.partition("\n")[0]


@functools.cache
def nests(qemu: str) -> bool:
    """Return whether TCG emulates a host of VMs faithfully, as far as is known.

    QEMU 7.2 does not: with nested paging, two VMs in the guest end by triple faults, or their host
    does. QEMU 10.0 does, with nested paging, but not without.
    """
    number = re.search(r" version (\d+)", version(qemu))
    return number is None or int(number[1]) >= 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that QEMU emulates.

    Attributes:
        image: the kernel to boot.
        cmdline: the kernel's command line.
        accelerator: what runs the guest's instructions.
        memory: the size of the memory in bytes.
        cpus: the number of CPUs.
        devices: values of further ``-device`` options.
        network: whether the guest has a network interface; only QEMU itself can be reached over it.
        root: the folder that is the guest's root.
        mapped: whether QEMU takes the user for root, so that the user's own files are root's in the
            guest.
        translations: the size of QEMU's buffer for translated code in MiB, if it emulates the CPU.
        files: the texts of the files in a share `pyluo` of the guest, by their paths, if it has
            that share, and another one `host` with the host's files; else None.
    """

    image: Path
    cmdline: str
    accelerator: Accelerator
    memory: int
    cpus: int
    devices: tuple[str, ...]
    network: bool
    root: Path
    mapped: bool
    translations: int
    files: Mapping[str, str] | None

    def options(self) -> list[str]:
        """Return QEMU's options for the machine, except the options that connect its channels."""
        options = [
            "-nodefaults", "-no-user-config", "-display", "none",
            *_processor(self.accelerator, self.translations),
            "-m", f"size={self.memory >> 10}K",
            "-smp", str(self.cpus),
            "-kernel", os.fspath(self.image),
            "-append", self.cmdline,
            # QEMU reports a panic over QMP, and the kernel can finish its trace on the console.
            "-device", "pvpanic-pci",
            "-action", "panic=none",
            "-no-reboot",
            # A kernel with CONFIG_FW_CFG_SYSFS tells this device where its data is, and QEMU adds
            # that to dumps, for drgn.
            "-device", "vmcoreinfo",
            *_share("root", self.root, "/dev/root"),
            "-object", "rng-random,id=rng,filename=/dev/urandom",
            "-device", "virtio-rng-pci,rng=rng",
            "-device", "virtio-serial-pci",
            "-device", f"virtserialport,chardev=control,name={port.CONTROL}",
            "-device", f"virtserialport,chardev=heart,name={port.HEARTBEAT}",
            "-device", f"virtserialport,chardev=terminal,name={port.TERMINAL}",
            "-device", "isa-serial,chardev=console",
            "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        if self.files is not None:
            options += _share("host", Path("/"))
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


def _processor(accelerator: Accelerator, translations: int) -> list[str]:
    """Return QEMU's options for the machine's type, its CPU and what runs it.

    Args:
        accelerator: what runs the guest's instructions.
        translations: the size of TCG's buffer for translated code in MiB. After a jump, QEMU still
            has translations of every page that contained code, and each store to such a page takes
            the slow path. A jump took 3.5 to 8 s with QEMU 7.2's default of 1 GiB, and 2.5 s with
            32 MiB, because QEMU flushes a buffer of that size about once in each life.
    """
    if accelerator is Accelerator.KVM:
        # intel-iommu can remap interrupts only with the split irqchip.
        return ["-machine", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", "host"]
    # Without ERMS the kernel clears pages eight bytes at a time instead of one, which saves a tenth
    # of a jump.
    tcg = f"tcg,tb-size={translations}"
    return ["-machine", "q35", "-accel", tcg, "-cpu", "max,erms=off"]


def _share(name: str, folder: Path, tag: str = "") -> list[str]:
    """Return QEMU's options for a folder that a guest can mount, to read it.

    Args:
        name: the name of the share in QEMU.
        folder: the folder.
        tag: the name by which the guest mounts it, if that is another one.
    """
    share = f"local,id={name},path={_escape(folder)},security_model=none"
    return [
        "-fsdev", f"{share},readonly=on,multidevs=remap",
        "-device", f"virtio-9p-pci,fsdev={name},mount_tag={tag or name}",
    ]  # fmt: skip


class QemuProcess:
    """A QEMU process that a keeper runs (see `keeper`), with a socket pair for each channel.

    The console is a pipe, not a socket. The guest's UART writes single bytes; a socket's buffer
    would be full after about 300 of them, because each write also counts a fixed overhead, and
    further bytes would be lost.

    Args:
        machine: the machine that QEMU emulates.

    Attributes:
        folder: the folder of mode 0700 that contains the console's log and QEMU's own messages; the
            keeper creates and removes the folder.
        console: the read end of the console's pipe.
        sockets: the harness's ends of the channels control, heart, terminal and qmp, by name.
        pid: the process id of QEMU; 0 until QEMU has started.
    """

    def __init__(self, machine: Machine) -> None:
        binary = find_binary()
        self.folder: Path = Path(tempfile.gettempdir(), f"pyluo-{secrets.token_hex(8)}")
        self._alive = self._status = -1
        self.sockets: dict[str, socket.socket] = {}
        qemu_sockets: list[socket.socket] = []
        command = ["unshare", "--map-root-user", "--"] if machine.mapped else []
        command += [binary, *machine.options()]
        texts = -1
        if machine.files is not None:
            command += _share("pyluo", self.folder / keeper.FILES)
            texts = Memfd.create("files", 0, executable=False).detach()
            os.write(texts, json.dumps(machine.files).encode())
            os.lseek(texts, 0, os.SEEK_SET)
        for name in _CHANNELS:
            self.sockets[name], other = socket.socketpair()
            qemu_sockets.append(other)
            command += ["-chardev", f"socket,id={name},fd={other.fileno()}"]
        console, console_input = os.pipe()
        with suppress(OSError):  # the user may have reached the limit for large pipes
            fcntl.fcntl(console_input, fcntl.F_SETPIPE_SZ, _CONSOLE_BUFFER)
        self.console: io.FileIO = os.fdopen(console, "rb", buffering=0)
        path = f"/dev/fd/{console_input},logfile={_escape(self.console_log)}"
        command += ["-chardev", f"file,id=console,path={path}"]
        alive, self._alive = os.pipe()
        self._status, status = os.pipe()
        fds = [alive, status, console_input, *(other.fileno() for other in qemu_sockets)]
        fds += [texts] if texts >= 0 else []
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
                    str(texts),
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
            os.close(console_input)
            if texts >= 0:
                os.close(texts)
            for other in qemu_sockets:
                other.close()
        self.pid: int = 0
        self._reports: asyncio.StreamReader | None = None

    @property
    def console_log(self) -> Path:
        """The file to which QEMU writes everything that comes over the serial line."""
        return self.folder / "console.log"

    @property
    def messages_log(self) -> Path:
        """The file that contains QEMU's own messages."""
        return self.folder / keeper.MESSAGES

    async def wait_for_start(self) -> None:
        """Wait until QEMU has started, and set `pid`.

        Raises:
            HarnessError: the keeper did not start QEMU.
        """
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

    @property
    def is_stopped(self) -> bool:
        """Whether QEMU was stopped by a signal, or by a debugger."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    async def wait_for_end(self) -> int:
        """Wait until QEMU ends.

        Returns:
            QEMU's exit status, or the negative number of the signal that ended it; -9 if the keeper
            was killed, too.
        """
        assert self._reports is not None
        return int(await self._reports.readline() or -9)

    def close(self) -> None:
        """Kill QEMU if it still runs, and remove the folder; closing it twice does nothing."""
        self._close_channels()
        self._keeper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # in case the keeper was killed

    def _close_channels(self) -> None:
        self.console.close()
        for channel in self.sockets.values():
            channel.close()
        if self._alive >= 0:
            # Closing the pipe is not enough: a forked child of this process may have it open.
            with suppress(BrokenPipeError):
                os.write(self._alive, b"\n")
        for fd in (self._alive, self._status):
            if fd >= 0:
                os.close(fd)
        self._alive = self._status = -1


def _escape(path: Path) -> str:
    """Return a path as QEMU's options need it: with commas doubled, as one would end the value."""
    return os.fspath(path).replace(",", ",,")
