"""Measure how fast pyluo and its harness are, as ratios of pairs taken in turns in one run.

Each ratio compares pyluo with the least that has to be done, mostly a program in C; curves show how
times grow with sizes. All is written to build/bench.json, and as a page to build/bench.html. Exit
status: 0 all was measured; 2 wrong usage, such as fewer than five pairs; 69 something could not be
measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import curves, page
from benchmarks.curves import CURVES
from benchmarks.keys import KEYS
from benchmarks.measuring import as_json, measure
from benchmarks.ratios import LEAST_PAIRS
from pyluo.cli.exit import PASSED, UNAVAILABLE
from pyluo.vm import Kernel, progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import qemu
from pyluo.vm.machine.accelerator import Choice
from pyluo.vm.output import Console

FOLDER = Path(__file__).parent.parent / "build"


def main() -> int:
    arguments = parse()
    lost = False
    try:
        machine = describe_machine(arguments.kernel)
    except HarnessError as error:
        progress.say(str(error))
        return UNAVAILABLE
    ratios, drawn = {}, {}
    for name in chosen(arguments):
        try:
            if name in KEYS:
                ratios[name] = measure(name, KEYS[name], arguments.kernel, arguments.rounds)
            else:
                sizes = arguments.sizes.get(name, CURVES[name].sizes)
                drawn[name] = curves.measure(
                    name, CURVES[name], arguments.kernel, sizes, arguments.repeats
                )
        except Exception:  # a guest that died, or a bug: the others are measured all the same
            traceback.print_exc()
            progress.say(f"{name} was not measured")
            lost = True
        result = as_json(ratios, drawn, machine)
        write(result)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return UNAVAILABLE if lost else PASSED


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    names = [*KEYS, *CURVES]
    parser.add_argument(
        "--only", nargs="+", metavar="KEY", choices=names, help=f"some of: {', '.join(names)}"
    )
    parser.add_argument(
        "--rounds", type=number_of_pairs, default=LEAST_PAIRS, metavar="N",
        help=f"of how many pairs each ratio is made; at least {LEAST_PAIRS}",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="how often each size is measured"
    )
    parser.add_argument(
        "--sizes", type=sizes_of_curve, action="append", default=[], metavar="CURVE=N,N,...",
        help="other sizes of a curve, such as memory=1,16,4096",
    )  # fmt: skip
    parser.add_argument("--kernel", default="stable", help="the guests' kernel")
    parser.add_argument("--builds", action="store_true", help="also what builds kernels, for hours")
    parser.add_argument("--json", action="store_true", help="print what build/bench.json has")
    arguments = parser.parse_args(argv)
    arguments.sizes = dict(arguments.sizes)
    builds = {name for name, key in KEYS.items() if key.builds}
    if not arguments.builds and (asked := builds.intersection(arguments.only or ())):
        parser.error(f"{', '.join(sorted(asked))}: builds kernels, for hours: say --builds as well")
    return arguments


def number_of_pairs(text: str) -> int:
    number = int(text)
    if number < LEAST_PAIRS:
        raise argparse.ArgumentTypeError(
            f"a ratio of {number} pairs says nothing: it takes at least {LEAST_PAIRS}"
        )
    return number


def sizes_of_curve(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, numbers = text.partition("=")
    sizes = tuple(sorted({int(number) for number in numbers.split(",")}))
    if name not in CURVES or sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"one of {', '.join(CURVES)}, =, and sizes above 0")
    return name, sizes


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Return the names of what the command line chooses, in the order of the tables."""
    if arguments.only:
        return [name for name in (*KEYS, *CURVES) if name in arguments.only]
    ratios = [name for name, key in KEYS.items() if arguments.builds or not key.builds]
    return [*ratios, *CURVES]


def describe_machine(kernel: str) -> dict[str, Any]:
    """Return what the guests run on; build their kernel, and try QEMU, if nobody has before."""
    binary = qemu.find_binary()
    return {
        "accelerator": Choice.make(binary).accelerator.value,
        "qemu": qemu.version(binary),
        "kernel": Kernel.find(kernel).release,
        "host": os.uname().release,
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": find_cpu_model(),
    }


def find_cpu_model() -> str:
    """Return the name of this machine's CPU."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else os.uname().machine


def write(result: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "bench.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    (FOLDER / "bench.html").write_text(page.render(result))


def show(result: dict[str, Any]) -> None:
    """Print a table of the ratios, one of the curves' exponents, and what ran."""
    console, machine = Console(), result["machine"]
    if ratios := {name: result[name] for name in KEYS if name in result}:
        table = Table(box=None)
        table.add_column("key", no_wrap=True)
        for heading in ("what is divided by what", "median", "least", "most", "noise", "goal"):
            table.add_column(heading)
        for name, ratio in ratios.items():
            key, noise = KEYS[name], machine["noise"][name]
            above, below = (f"({noise[f'{part}_seconds']:.3g} s)" for part in ("above", "below"))
            table.add_row(
                name,
                f"{key.above} {above}, by {key.below} {below}",
                *(f"{ratio[value]:.2f}" for value in ("median", "least", "most")),
                f"±{noise['spread'] / 2:.0%}, {noise['cores_of_others']:.1f} cores of others",
                f"{key.goal:g}",
            )
        console.print(table)
    if result["curves"]:
        table = Table("curve", "time", "for", "seconds", *curves.COLUMNS, box=None)
        for name, curve in result["curves"].items():
            for what, seconds in curve["seconds"].items():
                most = f"{curve['sizes'][-1]} {curve['unit']}"
                cells = curves.describe(curve, what)
                table.add_row(name, what, most, f"{seconds[-1]:.3g}", *cells)
        console.print(table)
    console.print(
        f"Linux {machine['kernel']} by {machine['accelerator']}, {machine['qemu']}, "
        f"{machine['cpus']} CPUs ({machine['cpu']}) of Linux {machine['host']}; "
        f"{FOLDER / 'bench.html'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
