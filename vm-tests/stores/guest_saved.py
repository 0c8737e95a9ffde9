"""The guest's part of the tests of saved files."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyluo import (
    HolderProcess,
    IncomingSession,
    IncomingStore,
    KeeperChoice,
    Memfd,
    OutgoingStore,
    RequestError,
    saved,
    session_from_fd,
)
from pyluo.keepers.holder import _address

FOLDER = Path("/run/source")
HOME, VICTIM = Path("/run/home"), Path("/run/victim")
_OWNER = 1000
FILES = {"empty": (0, 0o600), "two pages": (8192, 0o644), "run me": (3 << 20, 0o4755), "-x": (5, 0)}


def make_files() -> dict[str, tuple[int, int, str]]:
    """Create the files; return their sizes, modes and digests by name."""
    FOLDER.mkdir()
    for name, (size, mode) in FILES.items():
        path = FOLDER / name
        path.write_bytes((name.encode() * (size // len(name) + 1))[:size])
        path.chmod(mode)
    return describe(FOLDER)


def describe(folder: Path) -> dict[str, tuple[int, int, str]]:
    return {
        path.name: (
            path.stat().st_size,
            path.stat().st_mode & 0o7777,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in folder.iterdir()
    }


def remove_files() -> None:
    for folder in (FOLDER, "/run/target", "/run/evil", "/run/pyluo", HOME, VICTIM):
        shutil.rmtree(folder, ignore_errors=True)
    for file in ("/run/own", "/run/sparse"):
        Path(file).unlink(missing_ok=True)


def make_sparse(size: int) -> str:
    path = "/run/sparse"
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def list_sockets() -> list[str]:
    return sorted(path.name for path in Path("/run/pyluo").glob("*") if path.is_socket())


def kill_holder(name: str) -> None:
    """Kill the holder of a store, and wait until it is gone."""
    word, pid = HolderProcess().describe(name).split()
    assert word == "process"
    pidfd = os.pidfd_open(int(pid))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def ask_as_another_user() -> tuple[str, bytes]:
    """Return another user's results: with the folder's usual mode, and with all modes open."""
    code = (
        "import os, socket, sys\n"
        "os.setuid(1000)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "try:\n"
        "    s.connect(sys.argv[1])\n"
        '    s.send(b\'["list", "", null]\')\n'
        "    print('answered', socket.recv_fds(s, 64, 1)[:2])\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    address = Path(_address("vm0"))

    def ask() -> bytes:
        return subprocess.run(
            [sys.executable, "-c", code, os.fspath(address)], capture_output=True, check=True
        ).stdout.strip()

    first = ask()
    os.chmod("/run/pyluo", 0o755)
    address.chmod(0o777)
    try:
        second = ask()
    finally:
        os.chmod("/run/pyluo", 0o700)
    return first.decode(), second


def use_a_folder_that_others_may_enter() -> str:
    os.chmod("/run/pyluo", 0o755)
    try:
        HolderProcess().kept("s")
    except PermissionError as error:
        return str(error)
    finally:
        os.chmod("/run/pyluo", 0o700)
    return ""


def connect_and_stay_silent() -> bool:
    """Return whether a holder answers others while a silent client is connected."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(_address("vm0"))
        kept = HolderProcess().kept("vm0")
    for fd in kept.values():
        fd.close()
    return any(label.startswith("outgoing-") for label in kept)


def make_stores_that_save_did_not_make() -> list[OutgoingStore]:
    stores = []
    for name, entry, complete in (
        ("wrong digest", "file", True),
        ("elsewhere", "../evil", True),
        ("partly", "file", False),
    ):
        store = OutgoingStore.create(name, keeper=KeeperChoice.NONE)
        with Memfd.create("x", 4096) as memfd:
            meta = {"size": 4096, "mode": 0o644, "sha256": "0" * 64, "uid": 0, "gid": 0}
            store.add(entry, memfd, meta=meta)
        if complete:
            store.set_meta({"pyluo save": "complete"})
        stores.append(store)
    return stores


def read_entry_size(name: str, entry: str) -> int:
    """Return the size of an entry in the session that a failed restore left with its holder."""
    store = IncomingStore.retrieve(name)
    with store.get(entry, Memfd) as memfd:
        size = memfd.size
    store.close()
    return size


def read_kept_file(name: str, token: int) -> bytes:
    """Return what is in a file of the only session that a holder has."""
    (fd,) = HolderProcess().kept(name).values()
    session = session_from_fd(fd.detach())
    assert isinstance(session, IncomingSession)
    with session.retrieve(token, Memfd) as memfd:
        data = memfd.read(memfd.size, 0)
    os.close(session.detach())
    return data


def make_small_files(number: int) -> dict[str, str]:
    """Create many small files; return their digests by name."""
    FOLDER.mkdir()
    for each in range(number):
        (FOLDER / str(each)).write_text(f"contents of {each}")
    return read_digests(FOLDER)


def read_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def list_names(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.exists(folder) else []


def create_conflicting_file(folder: str, name: str) -> None:
    os.makedirs(folder, exist_ok=True)
    Path(folder, name).write_text("mine")


def interrupt_after_the_first_name(name: str, folder: str) -> list[str]:
    """Restore in a child, killed after it has named the first file; return the files then."""
    from pyluo import saved

    pid = os.fork()
    if not pid:
        real = os.link

        def link(source: str, target: str, **places: Any) -> None:
            real(source, target, **places)
            os.kill(os.getpid(), signal.SIGKILL)

        os.link = link  # type: ignore[assignment]
        try:
            saved.restore(name, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return [entry for entry in list_names(folder) if not entry.startswith(".pyluo-")]


def restore_as_another_user() -> int:
    """Return the mode of a set-uid file that a user other than root restores."""
    from pyluo.saved import SavedFile, _set_owner_and_mode

    path = "/run/own"
    Path(path).touch()
    os.chown(path, 1000, 1000)
    pid = os.fork()
    if not pid:
        try:
            os.setuid(1000)
            fd = os.open(path, os.O_RDWR)
            _set_owner_and_mode(fd, SavedFile("own", 0, 0o6755, "", 0, 0))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return os.stat(path).st_mode & 0o7777


def restore_where_the_owner_changes_the_path(name: str) -> None:
    """Restore into a folder of another user who puts links in its place, at different times."""
    VICTIM.mkdir()
    HOME.mkdir()
    os.chown(HOME, _OWNER, _OWNER)
    link, folder, moved = HOME / "link", HOME / "target", HOME / "moved"
    link.symlink_to(VICTIM)
    for path in (link, link / "below", HOME / ".." / "home" / "target"):
        with pytest.raises(RequestError, match="another user") as caught:
            saved.restore(name, path)
        assert caught.value.errno == errno.ELOOP
    assert list_names(os.fspath(VICTIM)) == []
    folder.mkdir()
    os.chown(folder, _OWNER, _OWNER)

    def swap(done: int) -> None:
        """Put a link in the place of the folder, while files are written into it."""
        if not moved.exists():
            folder.rename(moved)
            folder.symlink_to(VICTIM)

    saved.restore(name, folder, report=swap)
    assert list_names(os.fspath(VICTIM)) == []
    assert list_names(os.fspath(moved)) == sorted(FILES)


def save_what_the_owner_of_a_folder_links_to() -> str:
    """Return the refusal to save a file over a link of another user."""
    HOME.mkdir()
    os.chown(HOME, _OWNER, _OWNER)
    (HOME / "passwords").symlink_to("/etc/shadow")
    with pytest.raises(RequestError) as caught:
        saved.save("secrets", [HOME / "passwords"])
    shutil.rmtree(HOME)
    return str(caught.value)
