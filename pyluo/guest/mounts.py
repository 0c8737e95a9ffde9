"""The mounts of every guest; its root is the host's root, read-only."""

from __future__ import annotations

import os

from pyluo._sys import mount
from pyluo.errors import RequestError

__all__ = ["mount_all"]


def mount_all() -> None:
    """Mount the kernel's own file systems, and writable ones where programs expect to write."""
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("tmpfs", "/run", "tmpfs", "mode=0755")
    _mount_if_known("debugfs", "/sys/kernel/debug", "debugfs")
    _mount_if_known("securityfs", "/sys/kernel/security", "securityfs")
    for name, kind, options in (
        ("shm", "tmpfs", "mode=1777"),
        ("pts", "devpts", "gid=5,mode=620,ptmxmode=666"),
    ):
        os.mkdir(f"/dev/{name}")
        mount(name, f"/dev/{name}", kind, options)
    os.symlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    for folder in ("/tmp", "/var/tmp"):
        _make_writable(folder)


def _make_writable(folder: str) -> None:
    """Make a folder of the host writable in the guest: mount an overlay with a tmpfs on it.

    The host's files in the folder stay visible, because a checkout or a cache may be among them. If
    the kernel has no overlayfs, an empty tmpfs is mounted instead, which hides them.
    """
    upper, work = f"/run{folder}/upper", f"/run{folder}/work"
    os.makedirs(upper)
    os.makedirs(work)
    os.chmod(upper, 0o1777)
    options = f"lowerdir={folder},upperdir={upper},workdir={work}"
    if not _mount_if_known("overlay", folder, "overlay", options):
        mount("tmpfs", folder, "tmpfs", "mode=1777")


def _mount_if_known(source: str, target: str, kind: str, options: str = "") -> bool:
    """Mount a file system, and return whether that worked; the kernel may not know its type."""
    try:
        mount(source, target, kind, options)
    except RequestError:
        return False
    return True
