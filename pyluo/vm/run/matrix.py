"""Run tests on each of the routes of a matrix of kernels."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from pyluo.vm.results.cell import Cell, Route
from pyluo.vm.run import pytest_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.options import GuestOptions

__all__ = ["routes", "run_matrix"]


def routes(
    origins: Sequence[Kernel], targets: Sequence[Kernel], hops: Sequence[int]
) -> list[Route]:
    """Return a route for each pair of an origin and a target, and each number of hops."""
    return [Route(*each) for each in product(origins, targets, hops)]


async def run_matrix(
    routes: Sequence[Route],
    tests: Sequence[str],
    options: GuestOptions,
    *,
    jobs: int,
    limit: float,
    on_cell: Callable[[Cell], None],
) -> None:
    """Run tests on each route.

    Args:
        routes: the routes.
        tests: arguments for pytest; see `pytest_process.run_tests`.
        options: the options of the guests; their kernels are replaced by those of each route.
        jobs: how many routes to test at once; each runs one guest, unless a test needs more.
        limit: seconds after which the tests on a route are ended.
        on_cell: called with the cell of each route when its tests have ended, in any order. If
            this coroutine is cancelled, it is also called with the incomplete cells of the routes
            whose tests had begun.

    Raises:
        HarnessError: pytest could not be started on a route; raised after all routes have ended.
    """
    gate = asyncio.Semaphore(jobs)

    async def run_route(route: Route) -> None:
        async with gate:
            named = replace(options, kernel=route.origin.name, to=route.target.name)
            run = await pytest_process.run_tests(
                tests,
                named,
                [route.origin, route.target],
                hops=route.hops,
                limit=limit,
                on_cancelled=lambda run: on_cell(Cell(route, run)),
            )
        on_cell(Cell(route, run))

    # return_exceptions=True: wait for all routes even if one fails, or is cancelled while it waits
    # for its turn.
    for failure in await asyncio.gather(*map(run_route, routes), return_exceptions=True):
        if failure:
            raise failure
