"""Make roots from suites of Debian with mmdebstrap, and keep them in the cache.

The name of a root's folder in the cache is a digest of the suites and of the versions of all its
packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pyluo.vm import apt, cache, progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.packages import how_to_install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm.roots.catalogue import RootSpec

__all__ = ["MACHINE_ID", "build"]

MACHINE_ID = "70796c756f2067756573742070796c75"  # "pyluo guest pylu": no machine's, and always one

_NEEDED_SPACE = 1 << 30  # bytes: 0.2 GB of files, as much again while they are made, and a reserve
_HOSTNAME = "guest"
_TOOL = "mmdebstrap"
# Unless root runs it, mmdebstrap needs one of the commands that give a user further ids.
_ID_TOOL, _ID_PACKAGE = "newuidmap", "uidmap"
_INSTALLED = re.compile(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", re.MULTILINE)
# apt counts itself among the essential packages, and mmdebstrap does not.
_ESSENTIAL = "?and(?essential,?not(?exact-name(apt)))"
_FIELD = re.compile(r"^(Package|Status|Version): (.*)$", re.MULTILINE)
_IS_INSTALLED = "install ok installed"
# What apt and dpkg print of a package: fetched, unpacked, configured.
_STEP = re.compile(r"(Get:|Unpacking |Setting up )")
_STEPS = 3
# Of the files that need privileges to create, a guest has its own.
_OMITTED = ("./dev/*",)
_OPTIONS = (
    "--variant=essential",
    "--format=tar",
    '--aptopt=APT::Install-Recommends "false"',
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    f'--customize-hook=echo {MACHINE_ID} > "$1/etc/machine-id"',
    f'--customize-hook=echo {_HOSTNAME} > "$1/etc/hostname"',
    # The mirror and the proxy of this host, of which others need not know.
    '--customize-hook=rm -f "$1/etc/resolv.conf" "$1"/etc/apt/apt.conf.d/99mmdebstrap',
)


def build(spec: RootSpec, *, update: bool) -> Path:
    """Return the folder of a root, and make the root first unless the cache has it.

    The versions of its packages are saved, so that later runs find the same root and need no
    network.

    Only one root is made at a time; other processes wait, and then look in the cache again. What an
    interrupted build leaves is never mistaken for a root.

    Args:
        spec: the description of the root.
        update: whether to ask the archive for newer versions even if the cache has a root.

    Raises:
        HarnessError: the archive cannot be read or lacks a package, mmdebstrap is missing, the disk
            is full, or the root could not be made.
    """
    if not update and (found := _find_saved(spec)):
        return found
    _check_tools()
    with cache.lock("roots", lambda: progress.say("waiting for another build of a root to end")):
        if not update and (found := _find_saved(spec)):
            return found
        with apt.lock():
            versions = _resolve(spec)
        if not _folder(spec, versions).exists():
            versions = _make(spec, len(versions))
        wanted = [*spec.suites, *spec.packages]
        cache.write(_saved(spec), json.dumps({"wanted": wanted, "versions": versions}))
        return _folder(spec, versions)


def _find_saved(spec: RootSpec) -> Path | None:
    """Return the folder of the root that an earlier run made or found.

    The result is None if there is no such folder, or if roots.toml has changed since.
    """
    try:
        saved = json.loads(_saved(spec).read_text())
        folder = _folder(spec, dict(saved["versions"]))
        same = saved["wanted"] == [*spec.suites, *spec.packages]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return folder if same and folder.exists() else None


def _saved(spec: RootSpec) -> Path:
    return cache.folder() / f"root-{spec.name}.json"


def _folder(spec: RootSpec, versions: dict[str, str]) -> Path:
    parts = [spec.suites, sorted(versions.items()), _OPTIONS, _OMITTED]
    return _roots() / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _roots() -> Path:
    return cache.folder() / "roots"


def _make(spec: RootSpec, count: int) -> dict[str, str]:
    """Make a root in the cache, and return the versions of the packages in it, by their names.

    Args:
        spec: the description of the root.
        count: about how many packages there will be.
    """
    # Files that are set-uid belong to whoever makes the root: nobody else may reach them.
    _roots().mkdir(mode=0o700, exist_ok=True)
    for leftover in _roots().glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _check_space(_roots())
    with tempfile.TemporaryDirectory(prefix=".building-", dir=_roots()) as scratch:
        result = Path(scratch, "root")
        result.mkdir(mode=0o755)
        progress.say(f"making the root {spec.name} of {count} packages; the cache keeps it")
        _unpack(spec, count, result)
        versions = _read_installed(result)
        target = _folder(spec, versions)
        if not target.exists():  # unless the archive has just changed
            result.rename(target)
    return versions


def _unpack(spec: RootSpec, count: int, result: Path) -> None:
    command = [_TOOL, *_OPTIONS, "--verbose"]
    # Not in a file: mmdebstrap reads that as another user, unless it is run by root.
    command += [f"--aptopt={setting}" for setting in _system_settings()]
    command += [f"--include={','.join(spec.packages)}", spec.suites[0], "-"]
    command += apt.source_lines(spec.suites)
    # The owners are lost unless root makes the root: see `pyluo.vm.machine.userland`.
    unpacking = ["tar", "--extract", "--file=-", f"--directory={result}", "--preserve-permissions"]
    unpacking += ["--numeric-owner", *(f"--exclude={each}" for each in _OMITTED)]
    with (
        progress.bar(f"making {spec.name}", _STEPS * count) as move_bar,
        _running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as making,
        _running(unpacking, stdin=making.stdout, stderr=subprocess.PIPE) as unpacked,
    ):
        assert making.stdout is not None
        making.stdout.close()
        assert making.stderr is not None
        said: list[str] = []
        steps = 0
        for line in map(_decode, making.stderr):
            said.append(line)
            steps += _STEP.match(line) is not None
            move_bar(steps)
        _, complaint = unpacked.communicate()
        making.wait()
    if making.returncode:
        errors = [line for line in said if line.startswith("E: ")]
        raise HarnessError(
            f"the root {spec.name} could not be made", "\n" + "\n".join(errors[:3] or said[-30:])
        )
    if unpacked.returncode:
        raise HarnessError(f"the root {spec.name} cannot be unpacked ({_decode(complaint)})")


@contextmanager
def _running(
    command: list[str], **streams: int | IO[bytes] | None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in the block; if the block raises an exception, end the program.

    It gets a SIGTERM, after which mmdebstrap removes its files, which belong to other users if this
    one is not root.
    """
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "--", *command],
        env=apt.environment(),
        **{"stdin": subprocess.DEVNULL, **streams},  # type: ignore[call-overload]
    )
    try:
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()


def _resolve(spec: RootSpec) -> dict[str, str]:
    """Return the versions of the packages that apt would install, by their names."""
    if unreadable := [suite for suite in spec.suites if not apt.update_lists(suite)]:
        raise HarnessError(
            f"the root {spec.name} needs the suite {unreadable[0]} of the package archive",
            "check the network and the system's own `apt-get update`",
        )
    apt.use_suites(spec.suites)
    with tempfile.NamedTemporaryFile(prefix="pyluo-status-") as nothing_installed:
        said = apt.run(
            "apt-get", "install", "--simulate", "--no-install-recommends",
            "-o", f"Dir::State::status={nothing_installed.name}", _ESSENTIAL, *spec.packages,
        )  # fmt: skip
    return dict(_INSTALLED.findall(said))


def _system_settings() -> list[str]:
    """Return the settings of the system's apt for fetching files: proxies, checks, retries.

    mmdebstrap reads no configuration of the system, and a root is fetched as sources are.
    """
    said = apt.run("apt-config", "dump", "--no-empty", "--format", '%f "%v";%n', "Acquire")
    return [line for line in said.splitlines() if not line.startswith("Acquire::IndexTargets")]


def _read_installed(root: Path) -> dict[str, str]:
    """Return the versions of the packages in a root, by their names."""
    paragraphs = (root / "var/lib/dpkg/status").read_text().split("\n\n")
    fields = [dict(_FIELD.findall(paragraph)) for paragraph in paragraphs]
    return {
        each["Package"]: each["Version"] for each in fields if each.get("Status") == _IS_INSTALLED
    }


def _check_tools() -> None:
    missing = [] if shutil.which(_TOOL) else [_TOOL]
    if os.geteuid() != 0 and shutil.which(_ID_TOOL) is None:
        missing.append(_ID_PACKAGE)
    if missing:
        raise HarnessError(f"making a root needs {' '.join(missing)}", how_to_install(missing))


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_SPACE:
        raise HarnessError(
            f"{folder} has {free / 1e9:.1f} GB of free space, and a root needs "
            f"{_NEEDED_SPACE / 1e9:.1f} GB",
            "free some space, or set XDG_CACHE_HOME to a folder that has enough",
        )


def _decode(line: bytes) -> str:
    return line.decode(errors="replace").strip()
