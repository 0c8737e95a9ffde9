"""`pyluo vm matrix`: run tests that live-update guests between every two of several kernels."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED, UNAVAILABLE
from pyluo.cli.parsers import add_command
from pyluo.cli.vm import program, verdicts
from pyluo.vm.machine import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

    from pyluo.cli.parsers import Subparsers
    from pyluo.vm.results.cell import Cell, Route
    from pyluo.vm.results.verdict import Verdict

__all__ = ["add_parser"]

_KERNELS = ["previous", "stable"]
_WIDE = 200  # columns


def add_parser(subparsers: Subparsers) -> None:
    """Add the `matrix` action."""
    matrix = add_command(
        subparsers,
        "matrix",
        "Run tests between every two of several kernels",
        "pyluo vm matrix --from previous,stable --html page.html",
        "pyluo vm matrix --from ~/linux --to stable --hops 1 tests/test_seals.py",
    )
    options.add(matrix.add_argument, without=["kernel", "to"])
    matrix.add_argument(
        "--from", dest="origins", type=_parse_names, default=_KERNELS, metavar="KERNEL,...",
        help="the kernels to live-update from (default: previous,stable)",
    )  # fmt: skip
    matrix.add_argument(
        "--to", dest="targets", type=_parse_names, metavar="KERNEL,...",
        help="the kernels to live-update to, and back again if there are several hops "
        "(default: the same as --from)",
    )  # fmt: skip
    matrix.add_argument(
        "--hops", type=_parse_numbers, default=[1, 3], metavar="N,...",
        help="live updates in a row (default: 1,3)",
    )  # fmt: skip
    matrix.add_argument(
        "--jobs", "-j", type=options.count, metavar="N",
        help="how many routes at once (default: as many as cores and memory allow)",
    )  # fmt: skip
    program.add_limit(matrix)
    matrix.add_argument("--html", metavar="FILE", help="write a page with all results to FILE")
    verdicts.add_file_options(matrix)
    matrix.add_argument("--json", action="store_true", help="print JSON")
    matrix.add_argument(
        "tests", nargs="*", metavar="TEST",
        help="arguments for pytest: files, node ids, options after --; without any, pyluo's own "
        "checks run",
    )  # fmt: skip
    matrix.set_defaults(run=_matrix)


def _matrix(arguments: argparse.Namespace) -> int:
    from pyluo.vm.results.cell import Cell
    from pyluo.vm.results.pytest_run import NOT_RUN
    from pyluo.vm.run import matrix

    guest = options.GuestOptions.of(arguments)
    names = arguments.origins, arguments.targets or arguments.origins
    every = dict.fromkeys([*names[0], *names[1]])
    kernels = {name: guest.find(name, *every) for name in every}
    origins, targets = ([kernels[name] for name in each] for each in names)
    routes = matrix.routes(origins, targets, arguments.hops)
    cells: list[Cell] = []

    failure: BaseException | None = None

    def run() -> Iterator[Verdict]:
        nonlocal failure
        try:
            _run(routes, arguments, guest, cells)
        except (KeyboardInterrupt, Exception) as error:
            failure = error  # raised below, after the results so far were printed
        tried = {cell.route: cell for cell in cells}
        cells[:] = [tried.get(route) or Cell(route, NOT_RUN) for route in routes]
        for cell in cells:
            yield cell.verdict()

    with (
        _replace_file(arguments.html) as page,
        verdicts.write_files("matrix", run(), arguments.junit, arguments.ktap) as seen,
    ):
        for _ in seen:
            pass
        # Print first, because writing the files may fail.
        if arguments.json:
            print(json.dumps([cell.to_data() for cell in cells], indent=2), flush=True)
        else:
            _print_table(cells)
        if page:
            from pyluo.vm.results.page import render

            page.write(render(cells))
    if failure:
        raise failure
    return _status(cells)


@contextmanager
def _replace_file(path: str | None) -> Iterator[IO[str] | None]:
    """Give the block a temporary file to write; rename the file to `path` after the block.

    If the block raises an exception, an older file at `path` stays as it was.

    Args:
        path: the path of the file; if None, the block is given None.
    """
    if path is None:
        yield None
        return
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8", errors="replace") as file:
        try:
            yield file
        except BaseException:
            os.unlink(part)
            raise
    os.replace(part, path)


def _run(
    routes: Sequence[Route],
    arguments: argparse.Namespace,
    guest: options.GuestOptions,
    ended: list[Cell],
) -> None:
    """Run the tests on every route, and append the cell of each route to `ended` as it ends."""
    import asyncio  # here, because it costs a third of the start of every command

    from pyluo.vm import progress
    from pyluo.vm.machine.capacity import at_once
    from pyluo.vm.machine.needs import needs
    from pyluo.vm.run import matrix

    with progress.bar("routes", len(routes)) as advance:

        def take(cell: Cell) -> None:
            ended.append(cell)
            advance(len(ended))
            reason = f": {cell.run.reason}" if cell.run.reason else ""
            progress.say(f"{cell.route}: {cell.outcome.value}{reason}")

        ends = {end for route in routes for end in (route.origin, route.target)}
        memory = guest.memory or max(needs(end).memory for end in ends)
        jobs = arguments.jobs or at_once(memory, guest.cpus)
        asyncio.run(
            matrix.run_matrix(
                routes, arguments.tests, guest, jobs=jobs, limit=arguments.limit, on_cell=take
            )
        )


def _print_table(cells: Sequence[Cell]) -> None:
    from rich.table import Table

    from pyluo.vm.output import Console

    table = Table("from", "hops", *dict.fromkeys(f"to {_kernel_label(c.route, 1)}" for c in cells))
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        rows.setdefault((_kernel_label(cell.route, 0), str(cell.route.hops)), []).append(
            _summary(cell)
        )
    for head, row in rows.items():
        table.add_row(*head, *row)
    # If the output goes to a program, its lines must not be wrapped at the width of a terminal.
    width = None if sys.stdout.isatty() else _WIDE
    Console(highlight=False, markup=False, width=width).print(table)


def _kernel_label(route: Route, end: int) -> str:
    kernel = (route.origin, route.target)[end]
    return f"{kernel.name} {kernel.release}"


def _summary(cell: Cell) -> str:
    counts = Counter(verdict.outcome.value for verdict in cell.run.verdicts)
    parts = [f"{number} {outcome}" for outcome, number in counts.items()]
    parts += [f"blackout {cell.blackout:.2f} s"] if cell.blackout else []
    head = f"{cell.outcome.value}, {cell.route.direction.value}"
    return ": ".join(filter(None, [head, ", ".join(parts), cell.run.reason]))


def _status(cells: Sequence[Cell]) -> int:
    from pyluo.vm.results.verdict import Outcome

    outcomes = {cell.outcome for cell in cells}
    if Outcome.FAILED in outcomes:
        return FAILED
    return UNAVAILABLE if Outcome.NO_VERDICT in outcomes else PASSED


def _parse_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no kernel: write previous,stable")
    return list(dict.fromkeys(names))


def _parse_numbers(text: str) -> list[int]:
    return [options.count(number) for number in text.split(",")]
