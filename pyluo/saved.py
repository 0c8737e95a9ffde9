"""Carrying regular files over a live update: `save` before the jump, `restore` after it.

The contents are copied into memfds of a store, whose session a keeper has open until the jump.
After the jump, a keeper has the session open until the last file is on disk, so that a failed
restore can be repeated.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

from pyluo import guards
from pyluo.errors import PreservedMemoryError, RequestError, SessionNotFoundError, StoreError
from pyluo.keepers.choice import choose_keeper
from pyluo.keepers.keeper import KeeperChoice
from pyluo.memfd import Memfd
from pyluo.operation import raising
from pyluo.stores.incoming import IncomingStore
from pyluo.stores.kept import release_incoming, release_outgoing
from pyluo.stores.outgoing import OutgoingStore
from pyluo.trusted_path import open_file, open_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from pyluo.stores.entry import Entry

    Report = Callable[[int], None]

__all__ = ["SavedFile", "discard", "restore", "save"]

_CHUNK = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
# This metadata is written last. A store without it is incomplete: the jump came during the save.
_COMPLETE = {"pyluo save": "complete"}


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file as it was when it was saved.

    Attributes:
        name: the last component of the path.
        size: the size in bytes.
        mode: the permission bits; only root restores set-user-ID and set-group-ID bits.
        sha256: the SHA-256 of the contents, in hexadecimal.
        uid: the owner; only root restores it.
        gid: the group; only root restores it.
    """

    name: str
    size: int
    mode: int
    sha256: str
    uid: int
    gid: int


_FIELDS = {field.name for field in fields(SavedFile)} - {"name"}


def _report_total(report: Report, before: int, done: int) -> None:
    report(before + done)


def _ignore_progress(done: int) -> None:
    """Do nothing; this is the default of the `report` arguments."""


def save(
    name: str, paths: Sequence[str | os.PathLike[str]], *, report: Report = _ignore_progress
) -> tuple[list[SavedFile], str]:
    """Copy files into a new session, which a keeper has open from then on.

    Args:
        name: the name of the session.
        paths: the paths of regular files, whose last components differ.
        report: a function that is called with the number of bytes read so far.

    Returns:
        The saved files, and words for what keeps the session until the jump.

    Raises:
        ValueError: there are no files, two have the same name, or one is not a regular file.
        PreservedMemoryError: the files do not fit into memory (ENOMEM). Nothing was changed.
        RequestError: a path leads over a link that another user could change (ELOOP); a file
            cannot be read; see also `OutgoingStore.create` and `OutgoingStore.add`. The session is
            discarded in these cases.
    """
    files = _stat_files(paths)
    wanted = sum(-(-size // _PAGE) * _PAGE for _, size in files)
    in_cgroup, group = guards.room_in_cgroups()
    room = min(guards.preservable_memory() - guards.RESERVE, in_cgroup)
    if wanted > room:
        where = f" in the memory cgroup {group}" if room == in_cgroup else ""
        raise PreservedMemoryError(
            errno.ENOMEM,
            "save",
            f"session {name!r}: {wanted} bytes in {len(files)} files, {max(room, 0):.0f} bytes "
            f"available{where}",
        )
    store = OutgoingStore.create(name)
    assert store.keeper is not None
    try:
        saved: list[SavedFile] = []
        done = 0
        for path, size in files:
            saved.append(_copy_in(store, path, size, partial(_report_total, report, done)))
            done += size
        store.set_meta(_COMPLETE)
        store.close()  # the keeper has the session open
        kept_by = store.keeper.describe(name)
    except BaseException:
        store.discard()
        raise
    return saved, kept_by


def restore(
    name: str,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    report: Report = _ignore_progress,
) -> list[SavedFile]:
    """Write the files of a session into a folder, and then finish the session.

    The session is finished only when all files are on disk and their checksums are right. Until
    then the restore can be repeated.

    The folder may belong to another user, even if root restores: whatever its owner renames or
    replaces meanwhile, nothing is written outside of it.

    Args:
        name: the name of the session.
        folder: the folder, which is created if it does not exist.
        force: whether to replace existing files, or links, of the same names.
        report: a function that is called with the number of bytes written so far.

    Raises:
        StoreError: the session is not a store, or was not filled by a complete `save`.
        SessionNotFoundError: the last live update carried over no session of this name (ENOENT).
        RequestError: files of these names exist (EEXIST); the folder has no room for them
            (ENOSPC); the contents of a file do not match its checksum (EBADMSG); the path leads
            over a link that another user could change (ELOOP); or a file cannot be written.
    """
    store = _saved_store(name)
    try:
        saved = [_from_entry(store, entry) for entry in store.entries]
        opened = open_folder(folder, create=True)
        try:
            target = _Target(opened, os.fspath(folder))
            missing = _check_folder(target, saved, force)
            _copy_out(store, missing, target, force, report)
        finally:
            os.close(opened)
        store.finish(destroy=list(store))  # all of them are on disk
    except BaseException:
        store.close()
        raise
    return saved


def discard(name: str, *, force: bool = False) -> str:
    """Give up the files that `save` put into a session, before or after the jump.

    Args:
        name: the name of the session.
        force: whether to end a session even if it was not filled by a complete `save`.

    Returns:
        The direction of the session that was ended: "outgoing" or "incoming".

    Raises:
        SessionNotFoundError: there is no session of this name (ENOENT).
        StoreError: `save` did not fill the session, or not completely. A keeper still has it open.
    """
    if _discard_outgoing(name, force):
        return "outgoing"
    if force:
        try:
            incoming = IncomingStore.retrieve(name)
        except StoreError as error:
            error.session.finish()
            release_incoming(choose_keeper(KeeperChoice.DEFAULT), name)
            return "incoming"
    else:
        incoming = _saved_store(name)
    incoming.finish(destroy=list(incoming))
    return "incoming"


def _discard_outgoing(name: str, force: bool) -> bool:
    """Discard the outgoing store of this name; return whether there is one."""
    try:
        store = OutgoingStore.open(name)
    except SessionNotFoundError:
        return False
    except StoreError:
        keeper = choose_keeper(KeeperChoice.DEFAULT)
        if not force or keeper is None:
            raise
        release_outgoing(keeper, name)
        return True
    try:
        for entry in store.entries if not force else ():
            _from_entry(store, entry)
    except StoreError:
        store.close()
        raise
    store.discard()
    return True


def _saved_store(name: str) -> IncomingStore:
    """Return the incoming store of a session that a complete `save` filled.

    Raises:
        StoreError: the session is not such a store. A keeper still has it open.
    """
    try:
        store = IncomingStore.retrieve(name)
    except StoreError as error:
        if error.session is not None:
            os.close(error.session.detach())  # the keeper still has the session open
        error.hint = f"{error.hint.rstrip('.')}. {_how_to_retrieve(name)}"
        raise
    if store.meta != _COMPLETE or store.lost:
        store.close()
        raise StoreError(
            errno.EBADMSG,
            "restore",
            f"store {name!r}",
            f"It was not made by a `pyluo save` that completed. {_how_to_retrieve(name)}",
        )
    return store


def _how_to_retrieve(name: str) -> str:
    return f"A keeper has the session: pyluo.IncomingStore.retrieve({name!r}) takes it over"


def _stat_files(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[str, int]]:
    """Check that the files can be saved together; return their paths and sizes in bytes."""
    if not paths:
        raise ValueError("no files to save")
    found: dict[str, tuple[str, int]] = {}
    for path in [os.fspath(path) for path in paths]:
        name = os.path.basename(path)
        opened = open_file(path, os.O_PATH)
        status = os.fstat(opened)
        os.close(opened)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if name in found:
            raise ValueError(f"{found[name][0]} and {path} have the same name: save one of them")
        found[name] = path, status.st_size
    return list(found.values())


def _copy_in(store: OutgoingStore, path: str, size: int, report: Report) -> SavedFile:
    """Copy a file of `size` bytes into a memfd, and add the memfd to the store.

    Raises:
        RequestError: the file cannot be read, or changed while it was read (EAGAIN).
    """
    # O_NONBLOCK: if the path is a FIFO by now, do not wait for a process at its other end.
    source = open_file(path, os.O_RDONLY | os.O_NONBLOCK)
    name = os.path.basename(path)
    digest = hashlib.sha256()
    before = os.fstat(source)
    try:
        with Memfd.create("saved file", size) as memfd:
            done = 0
            with raising("read file", path):
                while chunk := os.read(source, _CHUNK):
                    if done + len(chunk) > size:
                        break
                    memfd.write(chunk, done)
                    digest.update(chunk)
                    done += len(chunk)
                    report(done)
            status = os.fstat(source)
            same_times = (status.st_mtime_ns, status.st_ctime_ns) == (
                before.st_mtime_ns,
                before.st_ctime_ns,
            )
            same_size = done == status.st_size == size
            if not same_times or not same_size or not stat.S_ISREG(status.st_mode):
                raise RequestError(errno.EAGAIN, "read file", path, "It changed while it was read")
            saved = SavedFile(
                name=name,
                size=size,
                mode=stat.S_IMODE(status.st_mode),
                sha256=digest.hexdigest(),
                uid=status.st_uid,
                gid=status.st_gid,
            )
            store.add(name, memfd, meta=_to_meta(saved))
            return saved
    finally:
        os.close(source)


def _to_meta(file: SavedFile) -> dict[str, Any]:
    return {name: value for name, value in asdict(file).items() if name != "name"}


def _from_entry(store: IncomingStore | OutgoingStore, entry: Entry) -> SavedFile:
    """Return the `SavedFile` of an entry; refuse an entry that `save` did not add.

    The name of such an entry could be a path that leads out of the target folder.
    """
    plain = os.path.basename(entry.name) == entry.name and entry.name not in (".", "..")
    numbers = [entry.meta.get(name) for name in ("size", "mode", "uid", "gid")]
    valid = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not plain or "\0" in entry.name or not valid or set(entry.meta) != _FIELDS:
        raise StoreError(
            errno.EBADMSG,
            "restore",
            f"store {store.name!r}, entry {entry.name!r}",
            "It was not made by `pyluo save`. `pyluo discard --force` gives it up all the same; "
            "after the jump, pyluo.IncomingStore retrieves it",
        )
    return SavedFile(name=entry.name, **entry.meta)


@dataclass(frozen=True, slots=True)
class _Target:
    """The folder that files are restored into.

    All files are named relative to its descriptor: by its path, its owner could lead us elsewhere.

    Attributes:
        fd: the descriptor.
        path: the path, for messages.
    """

    fd: int
    path: str

    def name(self, file: str) -> str:
        """Return the path of a file in the folder, for messages."""
        return os.path.join(self.path, file)


def _check_folder(target: _Target, saved: list[SavedFile], force: bool) -> list[SavedFile]:
    """Return the files that must be written into the folder.

    A file that exists already with the saved contents, mode and owner is left out: an interrupted
    restore wrote it.

    Raises:
        RequestError: another file of the same name exists (EEXIST), or there is no room (ENOSPC).
    """
    missing = [file for file in saved if not _is_restored(target, file)]
    existing = [
        file.name
        for file in missing
        if (mode := _mode_of(target, file.name)) is not None
        and not (force and (stat.S_ISREG(mode) or stat.S_ISLNK(mode)))
    ]
    if existing:
        raise RequestError(
            errno.EEXIST,
            "restore",
            f"{', '.join(existing)} in {target.path}",
            "Choose another folder, or replace files with --force; nothing was written",
        )
    room = os.fstatvfs(target.fd)
    wanted = sum(file.size for file in missing)
    if wanted > room.f_bavail * room.f_frsize:
        raise RequestError(
            errno.ENOSPC,
            "restore",
            f"{wanted} bytes to {target.path}",
            "Make room, or choose another folder; nothing was written",
        )
    return missing


def _mode_of(target: _Target, name: str) -> int | None:
    """Return the type and mode of what has a name in the folder; None if there is nothing."""
    try:
        return os.stat(name, dir_fd=target.fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _is_restored(target: _Target, file: SavedFile) -> bool:
    """Return whether a saved file is on disk already, with its contents, mode and owner."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(file.name, flags, dir_fd=target.fd), "rb") as file_on_disk:
            status = os.fstat(file_on_disk.fileno())
            seen = status.st_size, stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or seen != (file.size, _restored_mode(file)):
                return False
            if os.geteuid() == 0 and (status.st_uid, status.st_gid) != (file.uid, file.gid):
                return False
            os.fsync(file_on_disk.fileno())
            return hashlib.file_digest(file_on_disk, "sha256").hexdigest() == file.sha256
    except OSError:
        return False


def _copy_out(
    store: IncomingStore, saved: list[SavedFile], target: _Target, force: bool, report: Report
) -> None:
    """Write all files into a temporary folder, then move them to their final names."""
    with _temporary_folder(target, store.name) as temporary:
        done = 0
        for file in saved:
            for size in _write_file(store, file, temporary):
                done += size
                report(done)
        for file in saved:
            with raising("restore", target.name(file.name)):
                if force:
                    os.replace(file.name, file.name, src_dir_fd=temporary.fd, dst_dir_fd=target.fd)
                else:
                    _move_without_replacing(file.name, temporary, target)
        with raising("restore", target.path):
            _fsync_folder(target.fd)


@contextmanager
def _temporary_folder(target: _Target, name: str) -> Iterator[_Target]:
    """Create a temporary folder, which is removed at the end of the ``with`` block; yield it.

    A folder that a killed restore left behind is removed first.

    Raises:
        RequestError: the owner of the target has put another folder in its place (EEXIST).
    """
    digest = hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()
    inner = f".pyluo-{digest}"
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with raising("make folder", target.name(inner)):
        shutil.rmtree(inner, ignore_errors=True, dir_fd=target.fd)
        os.mkdir(inner, 0o700, dir_fd=target.fd)
        fd = os.open(inner, flags, dir_fd=target.fd)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or os.listdir(fd):
            raise RequestError(
                errno.EEXIST,
                "make folder",
                target.name(inner),
                "Another process has put another folder in its place",
            )
        yield _Target(fd, target.name(inner))
    finally:
        os.close(fd)
        shutil.rmtree(inner, ignore_errors=True, dir_fd=target.fd)


def _move_without_replacing(name: str, temporary: _Target, target: _Target) -> None:
    """Move a file to its final name without replacing another file."""
    places = {"src_dir_fd": temporary.fd, "dst_dir_fd": target.fd}
    try:
        os.link(name, name, follow_symlinks=False, **places)
    except OSError as error:
        # The file system has no hard links. Another process could create a file of the final name
        # between this check and the rename.
        has_no_links = error.errno in (errno.EPERM, errno.EOPNOTSUPP)
        if not has_no_links or _mode_of(target, name) is not None:
            raise
        os.rename(name, name, **places)


def _write_file(store: IncomingStore, file: SavedFile, temporary: _Target) -> Iterator[int]:
    """Write a saved file to disk; yield the number of bytes after each write."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        store.get(file.name, Memfd) as memfd,
        raising("write file", temporary.name(file.name)),
        open(os.open(file.name, flags, 0o600, dir_fd=temporary.fd), "wb") as out,
    ):
        for offset in range(0, memfd.size, _CHUNK):
            chunk = memfd.read(_CHUNK, offset)
            digest.update(chunk)
            out.write(chunk)
            yield len(chunk)
        if (memfd.size, digest.hexdigest()) != (file.size, file.sha256):
            raise RequestError(
                errno.EBADMSG,
                "restore",
                f"store {store.name!r}, file {file.name!r}",
                "It is not what was saved; nothing was finished, and no file was written",
            )
        _set_owner_and_mode(out.fileno(), file)
        out.flush()
        os.fsync(out.fileno())


def _set_owner_and_mode(fd: int, file: SavedFile) -> None:
    """Set the owner, if this process is root, and the mode."""
    if os.geteuid() == 0:
        os.fchown(fd, file.uid, file.gid)
    os.fchmod(fd, _restored_mode(file))


def _restored_mode(file: SavedFile) -> int:
    """Return the mode to restore: without set-ID bits unless this process is root."""
    return stat.S_IMODE(file.mode) if os.geteuid() == 0 else file.mode & 0o777


def _fsync_folder(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system cannot fsync folders
            raise
