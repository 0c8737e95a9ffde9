"""Measure how fast pyluo and its harness are, as ratios of pairs taken in turns in one run.

Each ratio compares pyluo with the least that has to be done, mostly a program in C. The ratios are
written to build/bench.json. Exit status: 0 all was measured; 2 wrong usage, such as fewer than five
pairs; 69 something could not be measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.keys import KEYS
from benchmarks.measuring import Measured, as_json, measure
from benchmarks.ratios import LEAST_PAIRS
from pyluo.cli.exit import PASSED, UNAVAILABLE
from pyluo.vm import Kernel, progress
from pyluo.vm.errors import GuestFailure, HarnessError
from pyluo.vm.machine import qemu
from pyluo.vm.machine.accelerator import Choice
from pyluo.vm.output import Console

RESULT = Path("build/bench.json")


def main() -> int:
    arguments = parse()
    lost = False
    measured: dict[str, Measured] = {}
    try:
        machine = describe_machine(arguments.kernel)
    except HarnessError as error:
        progress.say(str(error))
        return UNAVAILABLE
    for name in chosen(arguments):
        try:
            measured[name] = measure(name, KEYS[name], arguments.kernel, arguments.rounds)
        except (GuestFailure, HarnessError) as error:
            progress.say(f"{name} was not measured: {error}")
            lost = True
    result = as_json(measured, machine)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(measured, machine)
    return UNAVAILABLE if lost else PASSED


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KEY", choices=KEYS, help=f"one or more of: {', '.join(KEYS)}"
    )
    parser.add_argument(
        "--rounds", type=number_of_pairs, default=LEAST_PAIRS, metavar="N",
        help=f"how many pairs each ratio is made of; at least {LEAST_PAIRS}",
    )  # fmt: skip
    parser.add_argument("--kernel", default="stable", help="the guests' kernel")
    parser.add_argument("--builds", action="store_true", help="also what builds kernels, for hours")
    parser.add_argument("--json", action="store_true", help=f"print what {RESULT} has")
    return parser.parse_args(argv)


def number_of_pairs(text: str) -> int:
    number = int(text)
    if number < LEAST_PAIRS:
        raise argparse.ArgumentTypeError(
            f"a ratio of {number} pairs says nothing: it takes at least {LEAST_PAIRS}"
        )
    return number


def chosen(arguments: argparse.Namespace) -> list[str]:
    return [
        name
        for name, key in KEYS.items()
        if (name in arguments.only if arguments.only else arguments.builds or not key.builds)
    ]


def describe_machine(kernel: str) -> dict[str, Any]:
    """Return what the guests run on; build their kernel, and try QEMU, if nobody has before."""
    binary = qemu.find_binary()
    return {
        "accelerator": Choice.make(binary).accelerator.value,
        "qemu": qemu.version(binary),
        "kernel": Kernel.find(kernel).release,
        "host": os.uname().release,
        "cpus": len(os.sched_getaffinity(0)),
    }


def show(measured: dict[str, Measured], machine: dict[str, Any]) -> None:
    """Print a table of the ratios, and what ran."""
    headings = ("median", "least", "most", "noise", "goal")
    table = Table(box=None)
    table.add_column("key", no_wrap=True)
    for heading in ("what is divided by what", *headings):
        table.add_column(heading)
    for name, each in measured.items():
        key, ratio = KEYS[name], each.ratio
        table.add_row(
            name,
            f"{key.above} ({each.above:.3g} s), by {key.below} ({each.below:.3g} s)",
            *(f"{value:.2f}" for value in (ratio.median, ratio.least, ratio.most)),
            f"±{ratio.spread / 2:.0%}, {each.others:.1f} cores of others",
            f"{key.goal:g}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{machine['kernel']} by {machine['accelerator']}, {machine['qemu']}, "
        f"{machine['cpus']} CPUs, {machine['host']}",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
