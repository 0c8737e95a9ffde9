"""One step of a bisection: is the kernel of this tree good or bad, or can it not be told?"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyluo.vm import suite
from pyluo.vm.errors import HarnessError
from pyluo.vm.records import FAILURES
from pyluo.vm.suite import Result, Run

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence
    from pathlib import Path
    from typing import IO

    from pyluo.vm.options import GuestOptions

__all__ = ["Mark", "Step", "step"]


class Mark(enum.IntEnum):
    """What `git bisect run` takes an exit status for."""

    GOOD = 0
    BAD = 1
    SKIP = 125


@dataclass(frozen=True, slots=True)
class Step:
    """What a step came to.

    Attributes:
        mark: for git.
        reason: of it, in a line; empty if it is good.
        release: of the kernel; empty if it could not be built.
        run: of the tests; None if it did not come to that.
    """

    mark: Mark
    reason: str
    release: str = ""
    run: Run | None = None


def step(
    tree: Path,
    tests: Sequence[str],
    options: GuestOptions,
    *,
    hops: int,
    limit: float,
    match: re.Pattern[str] | None = None,
    unbootable: Mark = Mark.SKIP,
    output: IO[bytes] | None = None,
) -> Step:
    """Builds the kernel of a tree, runs tests with it, and judges.

    Only a test that failed on it, or a guest that died in one, makes a kernel bad. What does not
    compile or boot, and what the harness could not try, is skipped.

    Args:
        tree: the kernel's.
        tests: as for `suite.run`.
        options: of the guests; the tree stands in for the kernels that they leave open: `kernel`,
            and `to` as well.
        hops: as for `suite.run`.
        limit: as for `suite.run`.
        match: what a failure must say to count; others are skipped.
        unbootable: what a kernel is on which no test failed, and no guest booted for some.
        output: as for `suite.run`.
    """
    try:
        built = replace(options, kernel=str(tree), to=None).find_kernel()
    except HarnessError as error:
        return Step(Mark.SKIP, f"there is no kernel to test: {error}")
    try:
        filled_in = _filled_in(options, str(tree))
        run = asyncio.run(suite.run(tests, filled_in, hops=hops, limit=limit, output=output))
    except (HarnessError, OSError) as error:
        return Step(Mark.SKIP, f"the harness failed: {error}", built.release)
    return replace(_judge(run, match, unbootable), release=built.release, run=run)


def _filled_in(options: GuestOptions, tree: str) -> GuestOptions:
    return replace(options, kernel=options.kernel or tree, to=options.to or tree)


def _judge(run: Run, match: re.Pattern[str] | None, unbootable: Mark) -> Step:
    if run.result is Result.PASSED:
        return Step(Mark.GOOD, "")
    if run.result is Result.NO_VERDICT:
        return Step(Mark.SKIP, run.reason)
    failed = [record for record in run.records if record.outcome in FAILURES]
    if not any(record.booted for record in failed):
        return Step(unbootable, f"it does not boot: {failed[0].reason}")
    for record in failed:
        said = match is None or match.search(record.reason) or match.search(record.text)
        if record.booted and said:
            return Step(Mark.BAD, f"{record.test}: {record.reason}")
    return Step(Mark.SKIP, f"it failed of something else: {run.reason}")
