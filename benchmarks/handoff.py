"""How long nobody drives a device while it goes to another process, beside a whole live update.

The pause is from the last access of the process that has the device to the moment when its
successor may make the first, with the memory accounted to it; a transfer is on its way meanwhile.
The successor waits at the socket by then, while exec starts a Python first. A live update is
measured from the reboot to the first transfer after it, with the memory retrieved, the device bound
and attached, and what came over checked by DMA. What is compared is measured in one guest, in
turns, so that the load of the machine falls on all alike.
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
    chosen = parser.parse_args()
    measured = measure(chosen.kernel, chosen.rounds)
    if chosen.json:
        print(json.dumps(measured))
    else:
        show(measured)


def measure(kernel: str, rounds: int) -> dict[str, list[float]]:
    """Seconds by what was measured."""
    measured: dict[str, list[float]] = {"socket": [], "exec": [], "live update": []}
    with (
        VM(kernel, **guest_edu.GUEST) as vm,  # type: ignore[arg-type]
        progress.bar("handing over", rounds) as reached,
    ):
        for number in range(rounds):
            for how in ("socket", "exec"):
                seen = vm.call(guest_handoff.hand_over, how, "user")
                wrong = {key: seen.get(key) for key in ("wrong", "faults", "refused")}
                if any(wrong.values()):
                    sys.exit(f"by {how}: {wrong}")
                measured[how].append(seen["pause"])
            vm.hold(guest_dma.begin)
            vm.live_update()
            vm.hold(guest_dma.go_on, 1)
            pause = vm.timeline.between(REBOOT_CALLED, guest_dma.DRIVEN)
            measured["live update"].append(pause)
            vm.live_update()  # so that the next round finds the device in nobody's hands
            reached(number + 1)
    return measured


def show(measured: dict[str, list[float]]) -> None:
    """A table, with each median as a part of the live update's."""
    whole = statistics.median(measured["live update"])
    table = Table("", "median", "least", "most", "of a live update", box=None)
    for what, seconds in measured.items():
        median = statistics.median(seconds)
        times = (median, min(seconds), max(seconds))
        table.add_row(what, *(f"{time * 1000:.0f} ms" for time in times), f"{median / whole:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
