"""`pyluo vm matrix`: tests between every two of several kernels."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED, UNAVAILABLE
from pyluo.cli.vm import program, verdicts
from pyluo.vm.machine import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

    from pyluo.cli.parsers import Commands
    from pyluo.vm.run.matrix import Cell, Route
    from pyluo.vm.run.programs import Verdict

__all__ = ["add_parser"]

_KERNELS = ["previous", "stable"]
_WIDE = 200  # columns


def add_parser(actions: Commands) -> None:
    """Adds the action to the parser."""
    matrix = actions.add_parser("matrix", help="run tests between every two of several kernels")
    options.add(matrix.add_argument, without=["kernel", "to"])
    matrix.add_argument(
        "--from", dest="origins", type=_names, default=_KERNELS, metavar="KERNEL,...",
        help="to live-update from (default: previous,stable)",
    )  # fmt: skip
    matrix.add_argument(
        "--to", dest="targets", type=_names, metavar="KERNEL,...",
        help="to live-update to, and back again if there are several hops (default: as --from's)",
    )  # fmt: skip
    matrix.add_argument(
        "--hops", type=_numbers, default=[1, 3], metavar="N,...",
        help="live updates in a row (default: 1,3)",
    )  # fmt: skip
    matrix.add_argument(
        "--jobs", "-j", type=options.count, metavar="N",
        help="how many routes at once (default: as many as cores and memory allow)",
    )  # fmt: skip
    program.add_limit(matrix)
    matrix.add_argument("--html", metavar="FILE", help="write a page with all of it there")
    verdicts.add_files(matrix)
    matrix.add_argument("--json", action="store_true", help="as data")
    matrix.add_argument(
        "tests", nargs="*", metavar="TEST",
        help="for pytest: files, node ids, options after --; pyluo's own checks without any",
    )  # fmt: skip
    matrix.set_defaults(run=_matrix)


def _matrix(arguments: argparse.Namespace) -> int:
    from pyluo.vm.run import matrix
    from pyluo.vm.run.pytest_process import NOT_RUN

    guest = options.GuestOptions.of(arguments)
    names = arguments.origins, arguments.targets or arguments.origins
    every = dict.fromkeys([*names[0], *names[1]])
    kernels = {name: guest.find(name, *every) for name in every}
    origins, targets = ([kernels[name] for name in each] for each in names)
    routes = matrix.routes(origins, targets, arguments.hops)
    cells: list[Cell] = []

    failure: BaseException | None = None

    def told() -> Iterator[Verdict]:
        nonlocal failure
        try:
            _run(routes, arguments, guest, cells)
        except (KeyboardInterrupt, Exception) as error:
            failure = error  # what has been tried until then is told all the same
        tried = {cell.route: cell for cell in cells}
        cells[:] = [tried.get(route) or matrix.Cell(route, NOT_RUN) for route in routes]
        for cell in cells:
            yield from cell.verdicts()

    with (
        _replaced(arguments.html) as page,
        verdicts.written("matrix", told(), arguments.junit, arguments.ktap) as seen,
    ):
        for _ in seen:
            pass
        # First, in case that a file cannot be written.
        if arguments.json:
            print(json.dumps([cell.data() for cell in cells], indent=2), flush=True)
        else:
            _show(cells)
        if page:
            from pyluo.vm.results.page import render

            page.write(render(cells))
    if failure:
        raise failure
    return _status(cells)


@contextmanager
def _replaced(path: str | None) -> Iterator[IO[str] | None]:
    """A file that takes the place of another once all of it is written."""
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
    """Adds each cell to `ended` as it comes."""
    from pyluo.vm import progress
    from pyluo.vm.machine.needs import needs
    from pyluo.vm.machine.usage import at_once
    from pyluo.vm.run import matrix

    with progress.bar("routes", len(routes)) as reached:

        def tell(cell: Cell) -> None:
            ended.append(cell)
            reached(len(ended))
            reason = f": {cell.run.reason}" if cell.run.reason else ""
            progress.say(f"{cell.route}: {cell.result.value}{reason}")

        ends = {end for route in routes for end in (route.origin, route.target)}
        memory = guest.memory or max(needs(end).memory for end in ends)
        jobs = arguments.jobs or at_once(memory, guest.cpus)
        asyncio.run(
            matrix.run(routes, arguments.tests, guest, jobs=jobs, limit=arguments.limit, ended=tell)
        )


def _show(cells: Sequence[Cell]) -> None:
    from rich.table import Table

    from pyluo.vm.progress import Console

    table = Table("from", "hops", *dict.fromkeys(f"to {_named(c.route, 1)}" for c in cells))
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        rows.setdefault((_named(cell.route, 0), str(cell.route.hops)), []).append(_summary(cell))
    for head, row in rows.items():
        table.add_row(*head, *row)
    # A program that reads it is no narrow terminal.
    width = None if sys.stdout.isatty() else _WIDE
    Console(highlight=False, markup=False, width=width).print(table)


def _named(route: Route, end: int) -> str:
    kernel = (route.origin, route.target)[end]
    return f"{kernel.name} {kernel.release}"


def _summary(cell: Cell) -> str:
    counts = Counter(record.outcome.value for record in cell.run.records)
    told = [f"{number} {outcome}" for outcome, number in counts.items()]
    told += [f"blackout {cell.blackout:.2f} s"] if cell.blackout else []
    head = f"{cell.result.value}, {cell.route.direction.value}"
    return ": ".join(filter(None, [head, ", ".join(told), cell.run.reason]))


def _status(cells: Sequence[Cell]) -> int:
    from pyluo.vm.run.pytest_process import Result

    results = {cell.result for cell in cells}
    if Result.FAILED in results:
        return FAILED
    return UNAVAILABLE if Result.NO_VERDICT in results else PASSED


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no kernel: write previous,stable")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    return [options.count(number) for number in text.split(",")]
