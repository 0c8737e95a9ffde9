"""Look up the source lines of a kernel's code in its System.map and vmlinux."""

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
_TIMEOUT = 60  # seconds for addr2line, which takes a few seconds
# This symbol is defined in this file. The absolute path that vmlinux has for the symbol shows in
# which folder the source was.
_KNOWN_SYMBOL, _KNOWN_FILE = "start_kernel", "init/main.c"


class Symbols:
    """The symbols of a kernel; there are none if its System.map or vmlinux is not known."""

    def __init__(self, kernel: Kernel) -> None:
        self._vmlinux = kernel.vmlinux
        self._map = kernel.system_map
        self._has_lines = kernel.has("CONFIG_DEBUG_INFO")

    def find_lines(self, calls: Sequence[tuple[str, bool]]) -> dict[tuple[str, bool], str]:
        """Return the file and line of each call, if the kernel has debug information for it.

        Args:
            calls: for each call, a place in the code as the kernel prints it, `symbol+0x12/0x34`,
                and whether the place is a return address; if so, the line is that of the
                instruction before it, which is the call.
        """
        if not (self._has_lines and self._vmlinux and self._map and calls):
            return {}
        addresses = self._find_addresses({call[0] for call in calls})
        wanted = {call: addresses[call[0]] - call[1] for call in calls if call[0] in addresses}
        known = f"{_KNOWN_SYMBOL}+0x0/0x0"
        start = self._find_addresses({known}).get(known, 0)
        found = self._run_addr2line({start, *wanted.values()})
        folder = (found.get(start) or [""])[0].rpartition(_KNOWN_FILE)[0]
        return {
            call: " < ".join(place.removeprefix(folder) for place in found[address])
            for call, address in wanted.items()
            if address in found
        }

    def _find_addresses(self, places: set[str]) -> dict[str, int]:
        """Return the addresses of places in the code, each given as `symbol+0x12/0x34`.

        If several symbols have the same name, the size after the slash decides which one is meant.
        """
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

    def _run_addr2line(self, addresses: set[int]) -> dict[int, list[str]]:
        """Return the files and lines of each address: several if functions are inlined there.

        The innermost function comes first.
        """
        command = ["addr2line", "-a", "-i", "-e", os.fspath(self._vmlinux or ""), "--"]
        command += [f"{address:#x}" for address in addresses]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return {}  # a trace without source lines is better than no trace
        found: dict[int, list[str]] = {}
        address = 0
        for line in done.stdout.splitlines():
            if line.startswith("0x"):
                address = int(line, 16)
            elif not line.startswith("??"):
                place = os.path.normpath(line.partition(" (")[0])
                found.setdefault(address, []).append(place)
        return found
