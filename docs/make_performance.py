"""Write the page of the manual about performance, with its curves, from a run of the bench.

Given a bench.json, take over what it measured first. What it did not measure stays as it was, if
the machine was the same, and is left out of the page otherwise. With --check, say whether the page
is up to date, by the exit status.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.curves import COLUMNS, CURVES, describe
from benchmarks.keys import KEYS
from benchmarks.page import draw

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLDER = Path(__file__).parent
MEASURED = FOLDER / "measured.json"
PAGE = FOLDER / "explanation" / "performance.md"
DRAWINGS = FOLDER / "static" / "curves"

HEAD = """\
# Measured performance

This page shows what the bench measured on one machine: Linux {kernel}, run by {accelerator} of
{qemu}, on {cpus} CPUs ({cpu}) of Linux {host}. `make bench` measures the same on your machine, and
writes a page; `python docs/make_performance.py build/bench.json` makes this page of it.
{emulated}
## By the least that has to be done

Each ratio is the median of the ratios of pairs of times that were taken in turns, in the same guest
or on the same machine: lower is better, and 1 is the floor. Most floors are small programs in C, in
`benchmarks/floors`.

| what | seconds | by | seconds | ratio | least to most | goal |
| --- | --- | --- | --- | --- | --- | --- |
"""
EMULATED = """
This machine had no virtualization that works: QEMU translated every instruction of the guests. With
KVM, times and ratios are others.
"""
CURVES_HEAD = """
## By size

On logarithmic axes a straight line is a power of the size, and its exponent is how steep it is: 1
is linear, 2 quadratic, 0 does not depend on the size. Exponents are fitted to the three largest
sizes, since small ones show what each call costs. "Of the floor" is how many times the floor the
largest size takes. "Without the floor" is the exponent of what is left for pyluo when the time of
the same requests from C is taken away; the kernel's own exponent may be above 1.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("measured", nargs="?", type=Path, help="a bench.json")
    arguments = parser.parse_args()
    if arguments.check and arguments.measured:
        parser.error("--check only compares")
    if arguments.measured:
        take_over(json.loads(arguments.measured.read_text()))
    result = json.loads(MEASURED.read_text())
    files = {PAGE: make_page(result)}
    files |= {DRAWINGS / f"{name}.svg": draw(curve) for name, curve in result["curves"].items()}
    if arguments.check:
        out_of_date = [file for file, text in files.items() if _read(file) != text]
        out_of_date += set(DRAWINGS.glob("*")) - set(files)
        if out_of_date:
            names = ", ".join(map(str, out_of_date))
            sys.exit(f"{names} is out of date: run python docs/{Path(__file__).name}")
        return
    shutil.rmtree(DRAWINGS, ignore_errors=True)
    DRAWINGS.mkdir()
    for file, text in files.items():
        file.write_text(text)


def take_over(new: dict[str, Any]) -> None:
    """Keep what a run of the bench measured, and what was measured before on the same machine.

    Args:
        new: what bench.json contains.
    """
    old = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    if _describe(old) == _describe(new):
        curves, noise = old["curves"] | new["curves"], old["machine"]["noise"]
        machine = new["machine"] | {"noise": noise | new["machine"]["noise"]}
        new = old | new | {"curves": curves, "machine": machine}
    MEASURED.write_text(json.dumps(new, indent=2) + "\n")


def _describe(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.get("machine", {}).items() if name != "noise"}


def make_page(result: dict[str, Any]) -> str:
    """Return the text of the page.

    Args:
        result: what bench.json contains.
    """
    machine = result["machine"]
    emulated = EMULATED if machine["accelerator"] == "tcg" else ""
    text = HEAD.format(**machine, emulated=emulated)
    for name, key in KEYS.items():
        if name in result:
            ratio, noise = result[name], machine["noise"][name]
            row = [
                key.above, f"{noise['above_seconds']:.3g}", key.below,
                f"{noise['below_seconds']:.3g}", f"**{ratio['median']:.2f}**",
                f"{ratio['least']:.2f} to {ratio['most']:.2f}", f"{key.goal:g}",
            ]  # fmt: skip
            text += _row(row)
    if left_out := [
        name for name in (*KEYS, *CURVES) if name not in {**result, **result["curves"]}
    ]:
        text += f"\nNot measured: {', '.join(f'`{name}`' for name in left_out)}.\n"
    text += CURVES_HEAD
    for name in CURVES:
        if name in result["curves"]:
            text += "".join(_section(name, result["curves"][name]))
    return text


def _section(name: str, curve: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the section of a curve."""
    title = f"{curve['title'][0].upper()}{curve['title'][1:]}, by {curve['unit']}"
    yield f"\n### {title}\n\n![seconds by {curve['unit']}](../static/curves/{name}.svg)\n\n"
    yield _row([f"seconds, by {curve['unit']}", *map(str, curve["sizes"]), *COLUMNS])
    yield _row(["---"] * (1 + len(curve["sizes"]) + len(COLUMNS)))
    for what, seconds in curve["seconds"].items():
        yield _row([what, *(f"{time:.3g}" for time in seconds), *describe(curve, what)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


if __name__ == "__main__":
    main()
