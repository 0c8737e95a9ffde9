"""Checks that refuse requests that the kernel would accept, and then lose files or crash."""

from __future__ import annotations

import errno
import math
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo._sys import look, read_small_file
from pyluo.errors import NotPreservableError, PreservedMemoryError
from pyluo.memfd import forbids_executable_memfds
from pyluo.operation import raising

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "RESERVE",
    "SIZE_LIMIT",
    "MemoryDemand",
    "noexec_error",
    "preservable_memory",
    "refuse_full_cgroup",
    "room_in_cgroups",
]

RESERVE = 64 << 20
"""Bytes of memory outside the scratch areas that must remain free for the kernel.

Measured on Linux 7.3: the next kernel boots if 16 MiB of 512 MiB, or 32 MiB of 1 GiB, are left.
With half as much left, LIVEUPDATE_SESSION_PRESERVE_FD sometimes ran out of memory and the OOM
killer killed init. 64 MiB is twice the larger measured value.
"""

SIZE_LIMIT = 1 << 40
"""The size in bytes from which on a file cannot be preserved.

Kernels up to 7.3 allocate the list of a file's pages in one piece of less than 2 GiB.
"""

_CGROUP_RESERVE = 4 << 20
"""Bytes of a memory cgroup that must remain free: for page tables, and what other threads need."""

_OPERATION = "LIVEUPDATE_SESSION_PRESERVE_FD"
_CGROUPS = "/sys/fs/cgroup"
_MEMINFO = "/proc/meminfo"
_PAGETYPEINFO = "/proc/pagetypeinfo"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MEMINFO_NAMES = ("MemTotal", "MemFree", "MemAvailable", "CmaFree", "SwapTotal", "SwapFree")
_MEMINFO_FIELDS = re.compile(rf"^({'|'.join(_MEMINFO_NAMES)}): +(\d+) kB", re.M)
_ALLOWANCE_PERIOD = 0.05  # seconds


def noexec_error(subject: str) -> NotPreservableError:
    """Return the exception for a memfd that would be executable and sealed against writing.

    For a memfd made with MFD_NOEXEC_SEAL, memfd_luo_retrieve() creates an executable file and then
    adds F_SEAL_EXEC, which on an executable memfd implies the seals against writing.

    Args:
        subject: words for the file.

    Source: mm/memfd_luo.c, memfd_luo_retrieve(); mm/memfd.c, memfd_add_seals()
    """
    if forbids_executable_memfds():
        remedy = (
            "vm.memfd_noexec=2 allows no others, so it rules out the live update of memfds: set it "
            "to 0 or 1"
        )
    else:
        remedy = "create it with MFD_EXEC (with vm.memfd_noexec=1, memfds are noexec by default)"
    return NotPreservableError(
        errno.EINVAL,
        _OPERATION,
        f"{subject}, sealed noexec",
        f"It would come back executable and sealed against writing: {remedy}, or allow it with "
        "allow_noexec=True",
    )


class MemoryDemand:
    """The memory that it takes to preserve some files."""

    def __init__(self) -> None:
        self._size = 0
        self._holes = 0
        self._largest = 0

    def add(self, fds: Sequence[int]) -> int | None:
        """Add files.

        Args:
            fds: the descriptor of each file.

        Returns:
            The index of the first file that is sealed noexec, which `noexec_error` is for; None if
            none is.
        """
        files = look(fds)
        self._size += files.size
        self._holes += files.holes
        self._largest = max(self._largest, files.largest)
        return files.noexec

    def refuse_excess(self, subject: Callable[[], str], *, in_scratch: bool = True) -> None:
        """Refuse the files if preserving them would leave too little memory.

        The kernel would not refuse: its OOM killer would kill processes to free memory, and the
        kernel panics if it kills init.

        Holes are charged to the caller's memory cgroup as well. If that has no room, its OOM killer
        kills the process within the request.

        Args:
            subject: a function that returns words for the files, for the message of an error.
            in_scratch: whether some pages of the files may lie in scratch areas. False for files
                that a live update carried over: their pages never do.

        Raises:
            PreservedMemoryError: there is not enough memory (ENOMEM).
            NotPreservableError: a file has a tebibyte or more (EFBIG); kernels up to 7.3 cannot
                allocate the list of its pages, even with enough memory.
        """
        if self._largest >= SIZE_LIMIT:
            raise NotPreservableError(
                errno.EFBIG,
                _OPERATION,
                f"{subject()}: a file of {self._largest} bytes",
                "Split it into files of less than 1 TiB each, as `GuestRam` does",
            )
        if _granted_lately.take(self._size):
            return
        left_in_cgroup, group = room_in_cgroups()
        if self._holes and self._holes + _CGROUP_RESERVE > left_in_cgroup:
            raise PreservedMemoryError(
                errno.ENOMEM,
                _OPERATION,
                f"{subject()}: {_format_mib(self._holes)} to allocate, where the memory cgroup "
                f"{group} has room for {_format_mib(left_in_cgroup)}",
                f"The kernel would kill this process, as {_format_mib(_CGROUP_RESERVE)} beyond the "
                f"files must be left: raise memory.max, or preserve less",
            )
        room = preservable_memory() - RESERVE
        if self._size <= room:
            unclaimed = min(room - self._size, left_in_cgroup - _CGROUP_RESERVE - self._holes)
            _granted_lately.renew(unclaimed)
            return
        # Preserving moves pages out of scratch areas and reads swapped pages in. No interface tells
        # which pages of a file are affected, so assume as many as possible.
        bytes_to_move = _swap_in_use() + (_scratch_in_use() if in_scratch else 0)
        wanted = self._holes + min(self._size - self._holes, bytes_to_move)
        if wanted <= room:
            return
        raise PreservedMemoryError(
            errno.ENOMEM,
            _OPERATION,
            f"{subject()}: up to {_format_mib(wanted)} to allocate, "
            f"{_format_mib(max(room, 0))} available",
            f"Preserved pages lie outside the scratch areas that the next kernel boots in, and "
            f"{_format_mib(RESERVE)} beyond them are left to the kernel; free memory, preserve "
            f"less, or make the areas smaller with kho_scratch= on the kernel command line",
        )


class _Allowance:
    """Memory that was free a moment ago, and that small files may take without another look.

    Looking takes longer than preserving a small file. Two threads may take the same part of it at
    once: it is an eighth of what is left to the kernel.
    """

    def __init__(self) -> None:
        self._deadline = 0.0
        self._left = 0

    def renew(self, room: float) -> None:
        """Set the allowance after a look that found `room` bytes free."""
        self._left = int(max(min(room, RESERVE // 8), 0))
        self._deadline = time.monotonic() + _ALLOWANCE_PERIOD

    def take(self, size: int) -> bool:
        """Return whether `size` bytes are allowed; if so, take them from the allowance."""
        if size > self._left or time.monotonic() > self._deadline:
            return False
        self._left -= size
        return True


_granted_lately = _Allowance()


def refuse_full_cgroup(size: int | None, subject: Callable[[], str]) -> None:
    """Refuse to retrieve a file that does not, or might not, fit into the caller's memory cgroup.

    The kernel charges the pages to that cgroup. If the limit is exceeded, the retrieval fails and
    the file is lost; or the OOM killer kills the process, and the whole session is lost.

    Args:
        size: the size of the file in bytes; None if it is not known, as the kernel does not tell
            it before the file is retrieved. It cannot exceed the memory that is in use.
        subject: a function that returns words for the file, for the message of an error.

    Raises:
        PreservedMemoryError: the cgroup has too little room (ENOMEM).
    """
    if size == 0:
        return
    # Each time, because a limit may have been set just now, and a file may be all of a guest's RAM.
    room, group = room_in_cgroups()
    if room == math.inf:
        return
    if size is None:
        memory = _read_meminfo()
        wanted = float(memory["MemTotal"] - memory["MemFree"])
        amount = f"possibly {_format_mib(wanted)}"
        advice = "say how large it is (`size`), raise memory.max"
    else:
        wanted = size
        amount, advice = _format_mib(wanted), "raise memory.max"
    if wanted > room:
        raise PreservedMemoryError(
            errno.ENOMEM,
            "LIVEUPDATE_SESSION_RETRIEVE_FD",
            f"{subject()}: {amount}, where the memory cgroup {group} has room for "
            f"{_format_mib(room)}",
            f"The file would be lost: {advice}, or retrieve it outside of the cgroup; it is "
            "still in the session",
        )


def room_in_cgroups() -> tuple[float, str]:
    """Return the bytes left before the lowest memory limit, and the path of the limiting cgroup.

    The limits of the caller's cgroup and of its ancestors count. Without a limit, the result is
    infinity and "/".

    Source: Documentation/admin-guide/cgroup-v2.rst, memory.max, memory.current, memory.stat
    """
    room, tightest = math.inf, "/"
    path = ""
    for line in read_small_file("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            path = line.removeprefix("0::")
    while path:
        limit = read_small_file(f"{_CGROUPS}{path}/memory.max")
        if limit[:1].isdigit():  # neither missing nor "max"
            with suppress(OSError, ValueError):
                used = int(read_small_file(f"{_CGROUPS}{path}/memory.current"))
                left = int(limit) - used + _reclaimable(f"{_CGROUPS}{path}/memory.stat")
                if left < room:
                    room, tightest = max(left, 0), path
        # Check "/" too: in a container it is the container's own cgroup, which may have a limit.
        path = os.path.dirname(path) if path != "/" else ""
    return room, tightest


def _reclaimable(path: str) -> int:
    """Return the reclaimable bytes of page cache in a cgroup's memory.stat, without tmpfs pages."""
    total = 0
    with open(path) as file:
        for line in file:
            name, value = line.split()
            if name in ("active_file", "inactive_file"):
                total += int(value)
    return total


def preservable_memory() -> int:
    """Return how many bytes of memory are available outside the scratch areas.

    This is an estimate: MemAvailable minus CmaFree, because the kernel uses scratch areas as CMA.

    Source: Documentation/filesystems/proc.rst, meminfo; kernel/liveupdate/kexec_handover.c,
    kho_release_scratch()
    """
    memory = _read_meminfo()
    return memory["MemAvailable"] - memory["CmaFree"]


def _scratch_in_use() -> int:
    """Return the used bytes of the scratch areas; 0 if the caller may not read /proc/pagetypeinfo.

    Source: mm/vmstat.c, pagetypeinfo_showblockcount()
    """
    pages_per_block, column, blocks = 0, 0, 0
    try:
        with open(_PAGETYPEINFO) as file:
            for line in file:
                if line.startswith("Pages per block:"):
                    pages_per_block = int(line.split(":")[1])
                elif line.startswith("Number of blocks type"):
                    names = line.removeprefix("Number of blocks type").split()
                    column = names.index("CMA") - len(names)
                elif column and line.startswith("Node"):
                    blocks += int(line.split()[column])
    except (OSError, ValueError):
        return 0
    return max(blocks * pages_per_block * _PAGE - _read_meminfo()["CmaFree"], 0)


def _swap_in_use() -> int:
    memory = _read_meminfo()
    return memory["SwapTotal"] - memory["SwapFree"]


def _read_meminfo() -> dict[str, int]:
    """Return the values of /proc/meminfo that this module uses, in bytes."""
    with raising("open meminfo", _MEMINFO), open(_MEMINFO) as file:
        text = file.read()
    found = {name: int(kib) << 10 for name, kib in _MEMINFO_FIELDS.findall(text)}
    return dict.fromkeys(_MEMINFO_NAMES, 0) | found


def _format_mib(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"
