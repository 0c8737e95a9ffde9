"""Try one commit of a bisection: is its kernel good, bad, or not to be tested?"""

from __future__ import annotations

import asyncio
import enum
import re
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyluo.vm.errors import Death, GuestCrash, HarnessError
from pyluo.vm.results.verdict import FAILURES, Outcome
from pyluo.vm.run import pytest_process

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import IO

    from pyluo.vm.machine.options import GuestOptions
    from pyluo.vm.machine.vm import VM
    from pyluo.vm.results.pytest_run import PytestRun
    from pyluo.vm.results.verdict import Verdict

__all__ = ["Mark", "Step", "try_commit"]


class Mark(enum.IntEnum):
    """What an exit status means to `git bisect run`."""

    GOOD = 0
    BAD = 1
    SKIP = 125


@dataclass(frozen=True, slots=True)
class Step:
    """The result of trying one commit.

    Attributes:
        mark: what git is told.
        reason: why, in a line; empty if the commit is good.
        release: the kernel's release; empty if it could not be built.
        run: the run of the tests; None if it did not come to that.
    """

    mark: Mark
    reason: str
    release: str = ""
    run: PytestRun | None = None


def try_commit(
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
    """Build the kernel of a tree, run tests with it, and judge it.

    A kernel is bad only if a test failed on it or a guest died in a test. A kernel that does not
    compile or boot, or that the harness could not try, is skipped.

    Args:
        tree: the kernel tree.
        tests: as for `pytest_process.run_tests`.
        options: the options of the guests; where they name no `kernel` or no `to`, the tree's
            kernel is meant.
        hops: as for `run_tests`.
        limit: as for `run_tests`.
        match: what a failure must say to count; a commit that fails otherwise is skipped.
        unbootable: the mark of a kernel that does not boot.
        output: as for `run_tests`.
    """
    own = replace(options, kernel=str(tree), to=None)
    try:
        # The other kernels come first, so that a mistake in their names costs no build.
        others = [options.find(other, str(tree)) for other in (options.kernel, options.to) if other]
        built = own.find_kernel()
    except HarnessError as error:
        return Step(Mark.SKIP, f"there is no kernel to test: {error}")
    try:
        # If guests boot another kernel, their deaths would not tell that this one does not boot.
        if options.kernel and (death := _death_in_boot(own.guest(built))):
            return Step(unbootable, f"it does not boot: {death}", built.release)
        filled_in = replace(options, kernel=options.kernel or str(tree), to=options.to or str(tree))
        run = asyncio.run(
            pytest_process.run_tests(
                tests, filled_in, [built, *others], hops=hops, limit=limit, output=output
            )
        )
    except (HarnessError, OSError) as error:
        return Step(Mark.SKIP, f"the harness failed: {error}", built.release)
    unbooted = Mark.SKIP if options.kernel else unbootable
    return replace(_judge(run, match, unbooted), release=built.release, run=run)


def _death_in_boot(guest: VM) -> str:
    """Return what a guest dies of as it boots; empty if it boots.

    Raises:
        HarnessError: the guest could not be started, or QEMU ended.
    """
    try:
        with closing(guest.__enter__()):
            return ""
    except GuestCrash as crash:
        if crash.cause is Death.QEMU:  # the host's fault, not the kernel's
            raise HarnessError(str(crash)) from crash
        return f"{crash.cause.value}: {crash.reason}"


def _judge(run: PytestRun, match: re.Pattern[str] | None, unbootable: Mark) -> Step:
    if run.outcome is Outcome.PASSED:
        return Step(Mark.GOOD, "")
    if run.outcome is Outcome.NO_VERDICT:
        return Step(Mark.SKIP, run.reason)
    failed = [verdict for verdict in run.verdicts if verdict.outcome in FAILURES]
    if not any(verdict.booted for verdict in failed):
        return Step(unbootable, f"it does not boot: {failed[0].reason}")
    for verdict in failed:
        if verdict.booted and (match is None or match.search(_message(verdict))):
            return Step(Mark.BAD, f"{verdict.name}: {verdict.reason}")
    return Step(Mark.SKIP, f"it failed for another reason: {run.reason}")


def _message(verdict: Verdict) -> str:
    """Return what a failed test said, and what its failed subtests said."""
    failed = [each for each in verdict.subtests if each.outcome in FAILURES]
    return "\n".join(f"{each.reason}\n{_error_lines(each.text)}" for each in [verdict, *failed])


def _error_lines(text: str) -> str:
    """Return the lines of a pytest failure that say what was raised.

    The test's source is left out, since it holds all words that the test might ever fail with. A
    text without marked lines has no source in it.
    """
    return "\n".join(re.findall("^E .*", text, re.MULTILINE)) or text
