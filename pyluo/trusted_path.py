"""Opening paths of which other users could change a part meanwhile.

Whoever owns a folder can put a symbolic link in the place of a file or folder in it, at any time
between a check and a use. So that a path of root cannot be led elsewhere, it is walked from folder
to folder by descriptors. Links are followed only where nobody but this user and root could have
made them.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from pyluo.errors import RequestError
from pyluo.operation import raising

__all__ = ["open_file", "open_folder"]

_LINKS = 40  # followed at most, as the kernel does
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_folder(path: str | os.PathLike[str], *, create: bool = False) -> int:
    """Return a descriptor of a folder, which the caller must close.

    Args:
        path: the path of the folder.
        create: whether to create it, and folders above it, if they do not exist.

    Raises:
        RequestError: the path leads over a link that another user could change (ELOOP); or the
            folder cannot be opened or created.
    """
    return _open(os.fspath(path), os.O_RDONLY | os.O_DIRECTORY, create)


def open_file(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of an existing file, which the caller must close.

    Args:
        path: the path of the file.
        flags: the flags for open(2).

    Raises:
        RequestError: see `open_folder`.
    """
    return _open(os.fspath(path), flags, create=False)


def _open(path: str, flags: int, create: bool) -> int:
    with raising("open", path):
        folder, name = _walk(path, create)
        try:
            # By `name` nothing but the file itself is opened: if it has become a link, this fails.
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)


def _walk(path: str, create: bool) -> tuple[int, str]:
    """Follow a path up to its last component.

    Returns:
        A descriptor of the folder that has the last component, and the name of the component in it,
        which is not a link.
    """
    if not path:
        raise FileNotFoundError(errno.ENOENT, "")
    pending = _components(path)
    folder, trusted = _start(path)
    links = 0
    try:
        while pending:
            name = pending.pop()
            if name == ".." and not trusted:
                raise _untrusted(path, "'..', behind a folder of another user")
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                if not create:
                    raise
                with suppress(FileExistsError):  # another process was faster
                    os.mkdir(name, dir_fd=folder)
                pending.append(name)
                continue
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if not trusted or not _is_ours(status):
                    raise _untrusted(path, f"the link {name!r}, which another user can change")
                if links > _LINKS:
                    raise OSError(errno.ELOOP, "")
                target = os.readlink(name, dir_fd=folder)
                pending += _components(target)
                if target.startswith("/"):
                    os.close(folder)
                    folder = -1
                    folder, trusted = _start(target)
            elif pending:
                entered = os.open(name, _PATH | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = entered
                # What lies below a folder of another user is that user's to move around.
                trusted = trusted and _is_protected(os.fstat(folder))
            else:
                return folder, name
        return folder, "."
    except BaseException:
        if folder >= 0:
            os.close(folder)
        raise


def _components(path: str) -> list[str]:
    """Return the components of a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _start(path: str) -> tuple[int, bool]:
    """Open the folder in which a path begins; return it, and whether links in it are trusted."""
    folder = os.open("/" if path.startswith("/") else ".", _PATH | os.O_DIRECTORY)
    return folder, _is_protected(os.fstat(folder))


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _is_protected(status: os.stat_result) -> bool:
    """Return whether nobody but this user and root can replace their files in a folder."""
    if not _is_ours(status):
        return False
    if status.st_mode & stat.S_ISVTX:
        return True
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
    return not by_group and not status.st_mode & stat.S_IWOTH


def _untrusted(path: str, what: str) -> RequestError:
    return RequestError(
        errno.ELOOP,
        "open",
        path,
        f"The path leads over {what}: give a path without it, if it leads where you want",
    )
