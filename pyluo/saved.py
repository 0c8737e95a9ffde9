"""Files that are carried over a live update: saved before it, restored after it.

They lie in memfds of an `FdStore` whose session a holder process keeps. On the way back another
holder keeps it until the last file is on disk, so that a restore which fails can be run again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

from pyluo import guards, holder
from pyluo._sys import raising
from pyluo.errors import FdStoreError, LuoError, PreservedMemoryError
from pyluo.fdstore import FdStore
from pyluo.memfd import Memfd
from pyluo.session import IncomingSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from pyluo.contents import Entry
    from pyluo.holder import Holder

    Report = Callable[[int], None]

__all__ = ["SavedFile", "discard", "restore", "save"]

_CHUNK = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
# The last that is written: a jump may come while the first files are in already.
_COMPLETE = {"pyluo save": "complete"}


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One file, as it was when it was saved.

    Attributes:
        name: the last part of its path.
        size: in bytes.
        mode: its permission bits; who restores it without being root gets no set-id bits.
        sha256: of its contents, in hexadecimal.
        uid: of its owner, kept if root restores it.
        gid: likewise.
    """

    name: str
    size: int
    mode: int
    sha256: str
    uid: int
    gid: int


_FIELDS = {field.name for field in fields(SavedFile)} - {"name"}


def _report_total(report: Report, saved: list[SavedFile], done: int) -> None:
    report(sum(file.size for file in saved) + done)


def _ignore_progress(done: int) -> None:
    """What is told of the progress when nobody asks."""


def save(
    name: str, paths: Sequence[str | os.PathLike[str]], *, report: Report = _ignore_progress
) -> tuple[list[SavedFile], Holder]:
    """Copies files into a session of this name, and leaves it with a holder process.

    Args:
        name: of the session.
        paths: regular files, no two of one name.
        report: called with the bytes read so far.

    Returns:
        What was saved, and the process that holds it until the jump.

    Raises:
        ValueError: no files, two files of one name, or one that is no regular file.
        PreservedMemoryError: ENOMEM, they do not fit; nothing was done.
        LuoError: as `FdStore.create` and `FdStore.add` do, or a file cannot be read. Nothing is
            left behind then.
    """
    files = _find_files(paths)
    wanted = sum(-(-size // _PAGE) * _PAGE for _, size in files)
    room = guards.preservable_memory() - guards.RESERVE
    if wanted > room:
        raise PreservedMemoryError(
            errno.ENOMEM,
            "save",
            f"session {name!r}: {wanted} bytes in {len(files)} files, {max(room, 0)} bytes to be "
            f"had",
        )
    store = FdStore.create(name, table_size=sum(_entry_size(path) for path, _ in files) + 4096)
    try:
        saved: list[SavedFile] = []
        for path, size in files:
            saved.append(_copy_in(store, path, size, partial(_report_total, report, saved)))
        store.set_meta(_COMPLETE)
        process = holder.hold(store.outgoing)
    except BaseException:
        store.discard()
        raise
    os.close(store.detach())  # the holder has it
    return saved, process


def restore(
    name: str,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    report: Report = _ignore_progress,
) -> list[SavedFile]:
    """Writes what was saved under this name into a folder, then lets go of it.

    Nothing is finished until all files are on disk, and are what was saved: until then it can be
    run again.

    Args:
        name: of the session.
        folder: which is made if it is not there.
        force: replace files of the same names.
        report: called with the bytes written so far.

    Raises:
        FdStoreError: the session is no store, or holds what `save` did not put there.
        SessionNotFoundError: ENOENT, nothing of this name came in.
        LuoError: EEXIST, files of these names are there; ENOSPC, no room for them; EBADMSG, a file
            is not what was saved; and what writing raises.
    """
    process, store = _saved_store(name)
    try:
        saved = [_from_entry(store, entry) for entry in store.entries]
        missing = _check_folder(folder, saved, force)
        _copy_out(store, missing, os.fspath(folder), force, report)
        # Those that were on disk already, from a restore that was interrupted, are not read again.
        store.finish(destroy=[file.name for file in saved if file not in missing])
    except BaseException:
        _close_duplicate(store)
        raise
    with suppress(LuoError):  # all is done: a holder that is gone has nothing to release
        process.release()
    return saved


def discard(name: str, *, force: bool = False) -> str:
    """Gives up what was saved under this name, on either side of the jump.

    Args:
        name: of the session.
        force: destroy an incoming session even if it is not one that `save` made whole.

    Returns:
        The direction of the session that is gone: "outgoing" or "incoming".

    Raises:
        SessionNotFoundError: ENOENT, there is nothing of this name.
        FdStoreError: the incoming session holds something else; it is left with a holder.
    """
    if (process := holder.find(name, "outgoing")) is not None:
        process.release()
        return "outgoing"
    if force:
        process = holder.find(name, "incoming") or holder.retrieve(name)
        session = process.session()
        assert isinstance(session, IncomingSession)
        session.finish()
    else:
        process, store = _saved_store(name)
        store.finish(destroy=list(store))
    with suppress(LuoError):
        process.release()
    return "incoming"


def _saved_store(name: str) -> tuple[Holder, FdStore]:
    """What came in under this name, held by a process of its own, if `save` made all of it."""
    process = holder.find(name, "incoming") or holder.retrieve(name)
    session = process.session()
    assert isinstance(session, IncomingSession)
    try:
        store = FdStore(session)
    except FdStoreError as error:
        os.close(session.detach())  # the holder has it still
        error.hint = f"{error.hint.rstrip('.')}. {_name_holder(process)}"
        raise
    except BaseException:
        os.close(session.detach())
        raise
    if store.meta != _COMPLETE or store.lost:
        _close_duplicate(store)
        raise FdStoreError(
            errno.EBADMSG,
            "restore",
            f"store {name!r}",
            f"It is not what `pyluo save` leaves when it is done. {_name_holder(process)}",
        )
    return process, store


def _name_holder(process: Holder) -> str:
    return (
        f"Process {process.pid} holds the session: "
        f"pyluo.holder.find({process.name!r}, 'incoming').session() gives it"
    )


def _close_duplicate(store: FdStore) -> None:
    """Closes our descriptor of a session that its holder has still."""
    if not store.session.closed:
        os.close(store.detach())


def _find_files(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[str, int]]:
    """The paths and sizes, of files that can be saved together."""
    if not paths:
        raise ValueError("no files to save")
    found: dict[str, tuple[str, int]] = {}
    for path in [os.fspath(path) for path in paths]:
        name = os.path.basename(path)
        with raising("stat file", path):
            status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file")
        if name in found:
            raise ValueError(f"{found[name][0]} and {path} have one name: save one of them")
        found[name] = path, status.st_size
    return list(found.values())


def _entry_size(path: str) -> int:
    """The bytes that a file takes in the table of contents, at most."""
    return 320 + len(json.dumps(os.path.basename(path)))


def _copy_in(store: FdStore, path: str, size: int, report: Report) -> SavedFile:
    with raising("read file", path):
        # Should it have become a FIFO since we looked, nobody waits for its other end.
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
            still = (status.st_mtime_ns, status.st_ctime_ns) == (
                before.st_mtime_ns,
                before.st_ctime_ns,
            )
            whole = done == status.st_size == size
            if not still or not whole or not stat.S_ISREG(status.st_mode):
                raise LuoError(errno.EAGAIN, "read file", path, "It changed while it was read")
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


def _from_entry(store: FdStore, entry: Entry) -> SavedFile:
    """An entry as the file that `save` made of it, and not a path to elsewhere."""
    plain = os.path.basename(entry.name) == entry.name and entry.name not in (".", "..")
    numbers = [entry.meta.get(name) for name in ("size", "mode", "uid", "gid")]
    whole = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not plain or "\0" in entry.name or not whole or set(entry.meta) != _FIELDS:
        raise FdStoreError(
            errno.EBADMSG,
            "restore",
            f"store {store.name!r}, entry {entry.name!r}",
            "It was not made by `pyluo save`: retrieve it with FdStore",
        )
    return SavedFile(name=entry.name, **entry.meta)


def _check_folder(
    folder: str | os.PathLike[str], saved: list[SavedFile], force: bool
) -> list[SavedFile]:
    """The files that are to be written; refuses, before any is, what would overwrite or not fit.

    One that is there already, and is what was saved, was written by a restore that was interrupted.
    """
    with raising("make folder", os.fspath(folder)):
        os.makedirs(folder, exist_ok=True)
    missing = [file for file in saved if not _is_restored(os.path.join(folder, file.name), file)]
    there = [
        file.name
        for file in missing
        if os.path.lexists(path := os.path.join(folder, file.name))
        and not (force and os.path.isfile(path))
    ]
    if there:
        raise LuoError(
            errno.EEXIST,
            "restore",
            f"{', '.join(there)} in {os.fspath(folder)}",
            "Choose another folder, or replace files with --force; nothing was written",
        )
    room = os.statvfs(folder)
    wanted = sum(file.size for file in missing)
    if wanted > room.f_bavail * room.f_frsize:
        raise LuoError(
            errno.ENOSPC,
            "restore",
            f"{wanted} bytes to {os.fspath(folder)}",
            "Make room, or choose another folder; nothing was written",
        )
    return missing


def _is_restored(path: str, file: SavedFile) -> bool:
    try:
        status = os.lstat(path)
        seen = status.st_size, stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode) or seen != (file.size, _restored_mode(file)):
            return False
        if os.geteuid() == 0 and (status.st_uid, status.st_gid) != (file.uid, file.gid):
            return False
        with open(path, "rb") as there:
            os.fsync(there.fileno())
            return hashlib.file_digest(there, "sha256").hexdigest() == file.sha256
    except OSError:
        return False


def _copy_out(
    store: FdStore, saved: list[SavedFile], folder: str, force: bool, report: Report
) -> None:
    """Writes all files under temporary names, and gives them theirs once all are whole."""
    with _scratch(folder, store.name) as scratch:
        done = 0
        for file in saved:
            for size in _write_file(store, file, os.path.join(scratch, file.name)):
                done += size
                report(done)
        for file in saved:
            temporary, final = os.path.join(scratch, file.name), os.path.join(folder, file.name)
            with raising("restore", final):
                if force:
                    os.replace(temporary, final)
                else:
                    _move_without_replacing(temporary, final)
        with raising("restore", folder):
            _fsync_folder(folder)


@contextmanager
def _scratch(folder: str, name: str) -> Iterator[str]:
    """A folder for files on their way; what a killed restore left of it is cleared away."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()
    scratch = os.path.join(folder, f".pyluo-{digest}")
    with raising("make folder", scratch):
        shutil.rmtree(scratch, ignore_errors=True)
        os.mkdir(scratch, 0o700)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move_without_replacing(temporary: str, final: str) -> None:
    """Gives a file its name, and never replaces another by it."""
    try:
        os.link(temporary, final)
    except OSError as error:
        # A file system without hard links: the look comes first, and a moment remains.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or os.path.lexists(final):
            raise
        os.rename(temporary, final)


def _write_file(store: FdStore, file: SavedFile, path: str) -> Iterator[int]:
    digest = hashlib.sha256()
    with store.get(file.name, Memfd) as memfd, raising("write file", path), open(path, "xb") as out:
        for offset in range(0, memfd.size, _CHUNK):
            chunk = memfd.read(_CHUNK, offset)
            digest.update(chunk)
            out.write(chunk)
            yield len(chunk)
        if (memfd.size, digest.hexdigest()) != (file.size, file.sha256):
            raise LuoError(
                errno.EBADMSG,
                "restore",
                f"store {store.name!r}, file {file.name!r}",
                "It is not what was saved; nothing was finished, and nothing was written",
            )
        _set_owner_and_mode(out.fileno(), file)
        out.flush()
        os.fsync(out.fileno())


def _set_owner_and_mode(fd: int, file: SavedFile) -> None:
    """Owner and mode; set-id bits only along with the owner that they are about."""
    if os.geteuid() == 0:
        os.fchown(fd, file.uid, file.gid)
    os.fchmod(fd, _restored_mode(file))


def _restored_mode(file: SavedFile) -> int:
    return stat.S_IMODE(file.mode) if os.geteuid() == 0 else file.mode & 0o777


def _fsync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # as where there is nothing to write to
            raise
    finally:
        os.close(fd)
