"""The userland of a guest: the files that are its root, and its first process.

By default the root is the host's own, and the first process is `pyluo.guest.init`. With another
root, the first process is the systemd in it, and the worker is a service.
"""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pyluo.guest import commands
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import imports, modules
from pyluo.vm.roots.build import MACHINE_ID
from pyluo.vm.roots.root import MOUNTS, PYTHON, SYSTEMD, Root

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["HostUserland", "RootUserland", "Userland"]

_SERVICE = "pyluo.service"

_INIT = imports.GUEST / "init.py"
_SERVICE_PROGRAM = imports.GUEST / "service.py"
_9P = "trans=virtio,version=9p2000.L,cache=loose,msize=1048576"
_FILES = f"{MOUNTS}/pyluo"
_RUN = "systemd"  # the folder in the share that becomes /run/systemd
_SCRIPT = "init"


class Userland(Protocol):
    """The userland of a guest.

    Attributes:
        root: the folder that is the guest's root.
        mapped: whether the user's own files are root's in the guest.
        files: the texts of files that the harness gives the guest, by their paths; None if it
            needs no files but those of its root.
        options: options that the guest's kernel needs in addition to those of every guest.
        settings: words for the kernel's command line, before those of the user.
        has_systemd: whether the first process is systemd.
        translations: the size of QEMU's buffer for translated code in MiB; see `qemu`.
        patience: how many times as long as another guest this one may take to speak.
    """

    root: Path
    mapped: bool
    files: Mapping[str, str] | None
    options: Sequence[str]
    settings: Sequence[str]
    has_systemd: bool
    translations: int
    patience: int

    def words(self) -> list[str]:
        """Return the words of the kernel's command line that start the first process."""

    def path(self, path: str) -> str:
        """Return the path in the guest of a file or folder of the host."""

    def import_path(self) -> list[str]:
        """Return the folders, in the guest, from which it can import what this process can."""

    def imported_folders(self) -> list[str]:
        """Return the folders, in the guest, from which it imports pyluo."""


class HostUserland:
    """The host's own files, and a first process in Python.

    Args:
        network: whether the guest has a network interface.
    """

    def __init__(self, network: bool) -> None:
        self.root: Path = Path("/")
        self.mapped = False
        self.files: Mapping[str, str] | None = None
        self.options: Sequence[str] = ()
        self.settings: Sequence[str] = ()
        self.has_systemd = False
        self.translations = 32
        self.patience = 1
        self._network = network

    def words(self) -> list[str]:
        """Return the words that start Python, which the kernel gives PYLUO_* as its environment."""
        words = [
            f"PYLUO_PATH={':'.join(self.imported_folders())}",
            f"PYLUO_ARCHIVE={modules.find_archive()}",
        ]
        if self._network:
            words.append("PYLUO_NETWORK=1")
        words += [f"init={os.path.realpath(sys.executable)}", "--", "-I", "-S", "-X", "utf8"]
        return [*words, os.fspath(_INIT)]

    def path(self, path: str) -> str:
        """Return the same path."""
        return path

    def import_path(self) -> list[str]:
        """Return this process's sys.path, with the folders that pyluo needs."""
        return imports.import_path()

    def imported_folders(self) -> list[str]:
        """Return the folders of pyluo and its dependencies."""
        return imports.pyluo_path(self._network)


# What systemd needs (its README), beyond what every guest needs.
_SYSTEMD_OPTIONS = (
    "CONFIG_CGROUPS", "CONFIG_INOTIFY_USER", "CONFIG_SIGNALFD", "CONFIG_TIMERFD", "CONFIG_EPOLL",
    "CONFIG_UNIX", "CONFIG_FHANDLE",
)  # fmt: skip
_SETTINGS = (
    "systemd.volatile=state",
    f"systemd.machine_id={MACHINE_ID}",
    "systemd.condition_first_boot=no",
    "systemd.getty_auto=no",
    "systemd.show_status=error",  # each character on the serial line costs time
    "net.ifnames=0",  # the worker may be bringing the network up, by the interface's name
    "TERM=dumb",  # systemd asks no questions of such a terminal, and sends it no control codes
)
# Units of no use in a guest, which has no modules, no disks, and nothing that it keeps: without
# them and the generators a guest is up in half the time. An empty file hides a unit or a generator.
_UNUSED_UNITS = (
    "modprobe@.service", "kmod-static-nodes.service", "systemd-modules-load.service",
    "systemd-journal-catalog-update.service", "systemd-random-seed.service",
    "systemd-udev-load-credentials.service", "systemd-update-done.service", "fstrim.timer",
    "dpkg-db-backup.timer",
)  # fmt: skip
_UNUSED_GENERATORS = (
    "factory-reset", "getty", "gpt-auto", "hibernate-resume", "run", "ssh", "system-update",
)  # fmt: skip

_INIT_SCRIPT = f"""\
mount -a -T {_FILES}/fstab
cp -r {_FILES}/{_RUN} /run/systemd
exec /{SYSTEMD}
"""
# systemd would mount most of these as well, but each with a process of its own, and later than the
# worker can start.
_MOUNTED = f"""\
proc /proc proc defaults 0 0
sysfs /sys sysfs defaults 0 0
debugfs /sys/kernel/debug debugfs nofail 0 0
tmpfs /tmp tmpfs mode=1777 0 0
tmpfs /var tmpfs mode=0755 0 0
tmpfs /var/tmp tmpfs X-mount.mkdir,mode=1777 0 0
host {Root.host_path("/")} 9p X-mount.mkdir,ro,{_9P} 0 0
"""
_START = (
    f"mount -t tmpfs -o mode=0755 tmpfs /run && mkdir -p {_FILES} && "
    f"mount -t 9p -o ro,{_9P} pyluo {_FILES} && . {_FILES}/{_SCRIPT}"
)
# If the service ends, for whatever reason, the kernel panics, as if its first process had ended.
_SERVICE_UNIT = """\
[Unit]
Description=The worker of pyluo, which carries out the host's requests
DefaultDependencies=no
RefuseManualStop=yes
IgnoreOnIsolate=yes
SurviveFinalKillSignal=yes

[Service]
Type=exec
ExecStart={command}
ExecStopPost=/bin/sh -c 'test $SERVICE_RESULT = success || echo c > /proc/sysrq-trigger'
Environment={environment}
StandardOutput=file:/dev/console
StandardError=inherit
Nice={nice}
TasksMax=infinity
"""
_NICE = (
    -15
)  # or the worker would come last, behind everything that systemd starts; see `run_worker`


class RootUserland:
    """The files of a root, with its systemd as the first process and the worker as a service.

    In each life, before systemd starts, a script in a share of its own puts the units in place. The
    host's files are mounted as well, because pyluo and the functions for the guest are among them.

    Args:
        root: the root.
        network: whether the guest has a network interface.
        units: the texts of unit files and of drop-ins, by their paths in a folder of units.
    """

    def __init__(self, root: Root, network: bool, units: Mapping[str, str]) -> None:
        self.root: Path = root.folder
        self.mapped: bool = root.owned
        self.options: Sequence[str] = _SYSTEMD_OPTIONS
        self.settings: Sequence[str] = _SETTINGS
        self.has_systemd = True
        # systemd and what it starts is more code. Until all has started, QEMU takes 30 s of CPU
        # time with 32 MiB, and 21 s with 128 MiB.
        self.translations = 128
        self.patience = 3
        self._network = network
        written = dict.fromkeys(_UNUSED_UNITS, "")
        written |= {_SERVICE: self._service(), **_enable(_SERVICE, ["sysinit.target"])}
        for name, text in units.items():
            written |= {name: text, **_enable(name, _wanted_by(name, text))}
        files = {_SCRIPT: _INIT_SCRIPT, "fstab": _MOUNTED}
        files |= {f"{_RUN}/system/{name}": text for name, text in written.items()}
        generators = f"{_RUN}/system-generators/systemd"
        files |= {f"{generators}-{name}-generator": "" for name in _UNUSED_GENERATORS}
        self.files: Mapping[str, str] | None = files

    def words(self) -> list[str]:
        """Return the words that start a shell, which runs the script, which starts systemd."""
        return ["init=/bin/sh", "--", "-c", _START]

    def path(self, path: str) -> str:
        """Return the path below the folder where the host's files are."""
        return Root.host_path(path)

    def import_path(self) -> list[str]:
        """Return this process's sys.path without its Python's own library."""
        return [self.path(each) for each in imports.import_path() if not imports.is_standard(each)]

    def imported_folders(self) -> list[str]:
        """Return the folders of pyluo and its dependencies, but for the root's own cffi."""
        return [self.path(each) for each in imports.pyluo_path(self._network)]

    def _service(self) -> str:
        environment = [
            f"PATH={commands.PATH}", f"PYLUO_PATH={':'.join(self.imported_folders())}",
            *(["PYLUO_NETWORK=1"] if self._network else []),
        ]  # fmt: skip
        command = [f"/{PYTHON}", "-I", "-X", "utf8", self.path(os.fspath(_SERVICE_PROGRAM))]
        return _SERVICE_UNIT.format(
            command=" ".join(_quote(word.replace("$", "$$")) for word in command),
            environment=" ".join(map(_quote, environment)),
            nice=_NICE,
        )


def _enable(name: str, targets: Sequence[str]) -> dict[str, str]:
    """Return the drop-ins of targets, by their paths, that make them want a unit."""
    return {f"{target}.d/{name}.conf": f"[Unit]\nWants={name}\n" for target in targets}


def _wanted_by(name: str, text: str) -> list[str]:
    """Return the targets that want a unit, as its section [Install] has it.

    Raises:
        HarnessError: the text is no unit's.
    """
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#", ";")
    )
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise HarnessError(f"the unit {name} cannot be read", str(error)) from None
    return parser.get("Install", "WantedBy", fallback="").split()


def _quote(word: str) -> str:
    """Return a word as it has to stand in a unit: see systemd.syntax(7) and systemd.unit(5)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
