"""What pyluo refuses, since the kernel would take it and lose it, or die of it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo._sys import raising
from pyluo.errors import NotPreservableError, PreservedMemoryError
from pyluo.memfd import Seal, read_seals, supports_seals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "RESERVE",
    "preservable_memory",
    "refuse_excess_memory",
    "refuse_full_cgroup",
    "refuse_noexec",
    "room_in_cgroups",
]

RESERVE = 64 << 20
"""Bytes outside the scratch areas that preserving leaves to the kernel.

Measured on Linux 7.3: with 16 MiB left of 512, and 32 MiB of 1 GiB, the next kernel boots. With
half of that, the kernel that preserves sometimes runs out of memory in the request and kills init.
"""

_OPERATION = "LIVEUPDATE_SESSION_PRESERVE_FD"
_CGROUPS = "/sys/fs/cgroup"
_MEMINFO = "/proc/meminfo"
_PAGETYPEINFO = "/proc/pagetypeinfo"
_SIZE_LIMIT = 1 << 40
_PAGE = os.sysconf("SC_PAGE_SIZE")


def refuse_noexec(fd: int, subject: Callable[[], str]) -> None:
    """Refuses a memfd that would come back executable and sealed against writing.

    Raises:
        NotPreservableError: EINVAL.

    Source: mm/memfd_luo.c, memfd_luo_retrieve(): it adds the seal to an executable file.
    """
    if read_seals(fd) & Seal.EXEC:
        raise NotPreservableError(
            errno.EINVAL,
            _OPERATION,
            f"{subject()}, sealed noexec",
            "It would come back executable and sealed against writing; create it with MFD_EXEC "
            "(vm.memfd_noexec=1 makes every other memfd such a one), or allow it with "
            "allow_noexec=True",
        )


def refuse_excess_memory(
    fds: Sequence[int], subject: Callable[[], str], *, in_scratch: bool = True
) -> None:
    """Refuses files for whose pages there is no memory of the kind that can be preserved.

    The kernel would look for it until it kills processes, and panics when init is one of them.

    Args:
        fds: the files.
        subject: what they are, for the error.
        in_scratch: whether pages of theirs may lie in scratch areas; those of a file that came
            over do not.

    Raises:
        PreservedMemoryError: ENOMEM.
        NotPreservableError: EFBIG, a file of a tebibyte or more, for which no kernel up to 7.3 can
            make its list of pages, whatever memory there is.
    """
    sizes = [_allocated_size(fd) for fd in fds]
    if max(sizes, default=0) >= _SIZE_LIMIT:
        raise NotPreservableError(
            errno.EFBIG,
            _OPERATION,
            f"{subject()}: a file of {max(sizes)} bytes",
            "Split it into files of less than 1 TiB each",
        )
    wanted = sum(sizes)
    room = preservable_memory() - RESERVE
    if wanted <= room:
        return
    # Pages that lie in a scratch area move out of it, and swapped ones come in: which ones those
    # are, no interface tells.
    holes = sum(map(_size_of_holes, fds))
    elsewhere = _swap_in_use() + (_scratch_in_use() if in_scratch else 0)
    wanted = holes + min(wanted - holes, elsewhere)
    if wanted > room:
        raise PreservedMemoryError(
            errno.ENOMEM,
            _OPERATION,
            f"{subject()}: up to {_format_mib(wanted)} to allocate, {_format_mib(max(room, 0))} to be had",
            f"Preserved pages lie outside the scratch areas that the next kernel boots in, and "
            f"{_format_mib(RESERVE)} beyond them are left to the kernel; free memory, preserve less, or "
            f"make the areas smaller with kho_scratch= on the kernel command line",
        )


def refuse_full_cgroup(size: int, subject: str) -> None:
    """Refuses to retrieve a file that the caller's memory cgroup has no room for.

    The kernel charges its pages to that group, and a retrieval that fails loses the file; where
    somebody in the group may be killed, it is the one that retrieves, and with it the session.

    Args:
        size: of the file, in bytes.
        subject: what is to be retrieved, for the error.

    Raises:
        PreservedMemoryError: ENOMEM.
    """
    room, group = room_in_cgroups()
    if size > room:
        raise PreservedMemoryError(
            errno.ENOMEM,
            "LIVEUPDATE_SESSION_RETRIEVE_FD",
            f"{subject}: {_format_mib(size)}, where the memory cgroup {group} has room for {_format_mib(room)}",
            "The file would be lost: raise memory.max, or retrieve outside of the group; it is "
            "still in the session",
        )


def room_in_cgroups() -> tuple[float, str]:
    """The bytes that the caller's cgroup and those above it have left, and which is the tightest.

    Source: Documentation/admin-guide/cgroup-v2.rst, memory.max, memory.current, memory.stat
    """
    room, tightest = float("inf"), "/"
    path = ""
    with suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file:
            if line.startswith("0::"):
                path = line.removeprefix("0::").strip()
    while path:
        with suppress(OSError, ValueError):
            limit = _read_limit(f"{_CGROUPS}{path}/memory.max")
            used = _read_limit(f"{_CGROUPS}{path}/memory.current")
            left = limit - used + _reclaimable(f"{_CGROUPS}{path}/memory.stat")
            if left < room:
                room, tightest = max(left, 0), path
        # The topmost too: a container's own group looks like the root from within.
        path = os.path.dirname(path) if path != "/" else ""
    return room, tightest


def _reclaimable(path: str) -> int:
    """The bytes of a group's page cache that would give way; files of a tmpfs are not in it."""
    total = 0
    with open(path) as file:
        for line in file:
            name, value = line.split()
            if name in ("active_file", "inactive_file"):
                total += int(value)
    return total


def _read_limit(path: str) -> int:
    with open(path) as file:
        return int(file.read())  # "max" is none, and no limit


def preservable_memory() -> int:
    """Bytes of memory that could be preserved: free, or freed on demand, and outside scratch.

    An estimate, from MemAvailable and CmaFree: scratch areas serve as CMA meanwhile.

    Source: Documentation/filesystems/proc.rst, meminfo; kernel/liveupdate/kexec_handover.c,
    kho_release_scratch()
    """
    memory = _read_meminfo()
    return memory["MemAvailable"] - memory["CmaFree"]


def _allocated_size(fd: int) -> int:
    """The bytes that a preserved file takes, in whole pages; 0 for what is no file of a tmpfs."""
    if (
        not supports_seals(fd) or os.fstatvfs(fd).f_bsize != _PAGE
    ):  # huge pages: the kernel refuses them
        return 0
    return -(-os.fstat(fd).st_size // _PAGE) * _PAGE


def _size_of_holes(fd: int) -> int:
    allocation = _allocated_size(fd)
    return max(allocation - os.fstat(fd).st_blocks * 512, 0) if allocation else 0


def _scratch_in_use() -> int:
    """The bytes of scratch areas that are lent to files; 0 where only root could tell.

    Source: mm/vmstat.c, pagetypeinfo_showblockcount()
    """
    pages_of_a_block, column, blocks = 0, 0, 0
    try:
        with open(_PAGETYPEINFO) as file:
            for line in file:
                if line.startswith("Pages per block:"):
                    pages_of_a_block = int(line.split(":")[1])
                elif line.startswith("Number of blocks type"):
                    names = line.removeprefix("Number of blocks type").split()
                    column = names.index("CMA") - len(names)
                elif column and line.startswith("Node"):
                    blocks += int(line.split()[column])
    except (OSError, ValueError):
        return 0
    return max(blocks * pages_of_a_block * _PAGE - _read_meminfo()["CmaFree"], 0)


def _swap_in_use() -> int:
    memory = _read_meminfo()
    return memory["SwapTotal"] - memory["SwapFree"]


def _read_meminfo() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo."""
    fields = dict.fromkeys(("MemAvailable", "CmaFree", "SwapTotal", "SwapFree"), 0)
    with raising("open meminfo", _MEMINFO), open(_MEMINFO) as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in fields:
                fields[name] = int(rest.split()[0]) << 10
    return fields


def _format_mib(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"
