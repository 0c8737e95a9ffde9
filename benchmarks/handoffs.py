"""Measure how long no process drives a device during a handoff, next to a whole live update.

The pause of a handoff lasts from the last access by the process that has the device until its
successor can make the first one, with the memory accounted to the successor; a transfer is running
meanwhile. By then a successor by socket is waiting at the socket, while exec starts a new Python
first. A live update is measured from the reboot until the first transfer after it: the memory is
retrieved, the device bound and attached, and the preserved data checked by DMA. All of these are
measured in turns in one guest, so that the load of the machine affects them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "vm-tests"))

from handoff import guest_handoff
from vfio import guest_dma, guest_edu

from pyluo.vm import VM, progress
from pyluo.vm.machine.timeline import REBOOT_CALLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--kernel", default="stable")
    parser.add_argument("--json", action="store_true", help="as data, in seconds")
    arguments = parser.parse_args()
    measured = measure(arguments.kernel, arguments.rounds)
    if arguments.json:
        print(json.dumps(measured))
    else:
        show(measured)


def measure(kernel: str, rounds: int) -> dict[str, list[float]]:
    """Return the measured times in seconds, by what was measured."""
    measured: dict[str, list[float]] = {"socket": [], "exec": [], "live update": []}
    with (
        VM(kernel, **guest_edu.GUEST) as vm,  # type: ignore[arg-type]
        progress.bar("handing over", rounds) as advance,
    ):
        for number in range(rounds):
            for how in ("socket", "exec"):
                seen = vm.call(guest_handoff.hand_over, how, "user")
                wrong = {key: seen.get(key) for key in ("wrong", "faults", "refused")}
                if any(wrong.values()):
                    sys.exit(f"by {how}: {wrong}")
                measured[how].append(seen["pause"])
            vm.hold(guest_dma.preserve_machine)
            vm.live_update()
            vm.hold(guest_dma.restore_machine, 1)
            pause = vm.timeline.between(REBOOT_CALLED, guest_dma.DRIVEN)
            measured["live update"].append(pause)
            vm.live_update()  # so that no process has the device in the next round
            advance(number + 1)
    return measured


def show(measured: dict[str, list[float]]) -> None:
    """Print a table that shows each median also as a fraction of the live update's."""
    whole = statistics.median(measured["live update"])
    table = Table("", "median", "least", "most", "of a live update", box=None)
    for what, seconds in measured.items():
        median = statistics.median(seconds)
        times = (median, min(seconds), max(seconds))
        table.add_row(what, *(f"{time * 1000:.0f} ms" for time in times), f"{median / whole:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
