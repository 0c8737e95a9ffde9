"""Where in the source a kernel's symbols are, by what was kept of its build."""

from __future__ import annotations

import os
import re
import subprocess
from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["Symbols"]

_SYMBOL = re.compile(r"([\w.]+)\+0x([0-9a-f]+)/0x([0-9a-f]+)")
_TIMEOUT = 60  # seconds for addr2line; it takes a few
# A symbol whose file is known, by which the folder of the source is found.
_KNOWN, _FILE = "start_kernel", "init/main.c"


class Symbols:
    """The symbols of a kernel; none if it came without its System.map or vmlinux."""

    def __init__(self, kernel: Kernel) -> None:
        self._vmlinux = kernel.vmlinux
        self._map = kernel.system_map
        self._known = kernel.has("CONFIG_DEBUG_INFO")

    def lines(self, calls: Sequence[tuple[str, bool]]) -> dict[tuple[str, bool], str]:
        """The file and line of each place in the code that the debug information knows.

        Args:
            calls: each a place as the kernel prints it, `symbol+0x12/0x34`, and whether it is where
                a call returns to; the line of the call is the one before it.
        """
        if not (self._known and self._vmlinux and self._map and calls):
            return {}
        addresses = self._addresses({call[0] for call in calls})
        wanted = {call: addresses[call[0]] - call[1] for call in calls if call[0] in addresses}
        start = self._addresses({f"{_KNOWN}+0x0/0x0"}).get(f"{_KNOWN}+0x0/0x0", 0)
        found = self._look_up({start, *wanted.values()})
        folder = (found.get(start) or [""])[0].rpartition(_FILE)[0]
        return {
            call: " < ".join(place.removeprefix(folder) for place in found[address])
            for call, address in wanted.items()
            if address in found
        }

    def _addresses(self, places: set[str]) -> dict[str, int]:
        """The addresses of places; a name that several symbols have is told by its size."""
        assert self._map is not None
        symbols = [line.split() for line in self._map.read_text().splitlines()]
        order = sorted({int(symbol[0], 16) for symbol in symbols})
        starts: dict[str, list[int]] = {}
        for address, _, name in symbols:
            starts.setdefault(name, []).append(int(address, 16))
        addresses = {}
        for place in places:
            match = _SYMBOL.fullmatch(place)
            assert match is not None
            size = int(match[3], 16)
            candidates = starts.get(match[1], [])
            if len(candidates) > 1:
                candidates = [
                    start
                    for start in candidates
                    if (following := bisect_right(order, start)) < len(order)
                    and order[following] - start == size
                ]
            if len(candidates) == 1:
                addresses[place] = candidates[0] + int(match[2], 16)
        return addresses

    def _look_up(self, addresses: set[int]) -> dict[int, list[str]]:
        """File and line of each address, the innermost of inlined functions first."""
        command = ["addr2line", "-a", "-i", "-e", os.fspath(self._vmlinux or ""), "--"]
        command += [f"{address:#x}" for address in addresses]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return {}  # a trace without lines is better than none
        found: dict[int, list[str]] = {}
        address = 0
        for line in done.stdout.splitlines():
            if line.startswith("0x"):
                address = int(line, 16)
            elif not line.startswith("??"):
                place = os.path.normpath(line.partition(" (")[0])
                found.setdefault(address, []).append(place)
        return found
