"""Run tests on every route between several kernels."""

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
    """Return a route for every pair, with each number of hops."""
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
        routes: the routes to try.
        tests: as for `pytest_process.run_tests`.
        options: the options of the guests; the kernels are those of the route.
        jobs: how many routes at once; each has one guest at a time, unless a test has more.
        limit: seconds for the tests of a route.
        on_cell: called with each cell, in whatever order they come. If this is interrupted, also
            with what the routes that had begun came to by then.

    Raises:
        HarnessError: pytest could not be started on a route; the others have ended then.
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

    # If one is cancelled while it waits for its turn, the others still end properly.
    for failure in await asyncio.gather(*map(run_route, routes), return_exceptions=True):
        if failure:
            raise failure
