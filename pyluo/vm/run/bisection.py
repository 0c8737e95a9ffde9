"""One step of a bisection: is the kernel of this tree good or bad, or can it not be told?"""

from __future__ import annotations

import asyncio
import enum
import re
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyluo.vm.errors import Death, GuestCrash, HarnessError
from pyluo.vm.pytest.recorder import FAILURES
from pyluo.vm.run import pytest_process
from pyluo.vm.run.pytest_process import Result, Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import IO

    from pyluo.vm.machine.options import GuestOptions
    from pyluo.vm.machine.vm import VM
    from pyluo.vm.pytest.recorder import Record, Subtest

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
        tests: as for `pytest_process.run`.
        options: of the guests; the tree stands in for the kernels that they leave open: `kernel`,
            and `to` as well.
        hops: as for `pytest_process.run`.
        limit: as for `pytest_process.run`.
        match: what a failure must say to count; others are skipped.
        unbootable: what a kernel is that does not boot.
        output: as for `pytest_process.run`.
    """
    itself = replace(options, kernel=str(tree), to=None)
    try:
        # A mistake in it is to cost no build.
        others = [options.find(other, str(tree)) for other in (options.kernel, options.to) if other]
        built = itself.find_kernel()
    except HarnessError as error:
        return Step(Mark.SKIP, f"there is no kernel to test: {error}")
    try:
        # Where guests boot another one, what they die of would not tell that this does not boot.
        if options.kernel and (death := _dies(itself.guest(built))):
            return Step(unbootable, f"it does not boot: {death}", built.release)
        filled_in = _filled_in(options, str(tree))
        run = asyncio.run(
            pytest_process.run(
                tests, filled_in, [built, *others], hops=hops, limit=limit, output=output
            )
        )
    except (HarnessError, OSError) as error:
        return Step(Mark.SKIP, f"the harness failed: {error}", built.release)
    unbooted = Mark.SKIP if options.kernel else unbootable
    return replace(_judge(run, match, unbooted), release=built.release, run=run)


def _dies(guest: VM) -> str:
    """What a guest dies of as it boots; empty if it does not.

    Raises:
        HarnessError: it could not be started, or QEMU ended.
    """
    try:
        with closing(guest.__enter__()):
            return ""
    except GuestCrash as crash:
        if crash.death is Death.QEMU:  # which is the host's matter
            raise HarnessError(str(crash)) from crash
        return f"{crash.death.value}: {crash.reason}"


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
        if record.booted and (match is None or match.search(_said(record))):
            return Step(Mark.BAD, f"{record.test}: {record.reason}")
    return Step(Mark.SKIP, f"it failed of something else: {run.reason}")


def _said(record: Record) -> str:
    """What a failure said, and those of its subtests."""
    failed = [each for each in record.subtests if each.outcome in FAILURES]
    told: list[Record | Subtest] = [record, *failed]
    return "\n".join(f"{each.reason}\n{_marked(each.text)}" for each in told)


def _marked(text: str) -> str:
    """Of pytest's text what is marked as said, and not the test's own source, which has all words
    that the test might ever fail with; without a mark, there is no source in it."""
    return "\n".join(re.findall("^E .*", text, re.MULTILINE)) or text
