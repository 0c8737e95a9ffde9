"""Test one commit of a bisection: its kernel is good, is bad, or cannot be tested."""

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
    """The verdict on a commit; the value is the exit status that tells it to `git bisect run`."""

    GOOD = 0
    BAD = 1
    SKIP = 125


@dataclass(frozen=True, slots=True)
class Step:
    """The result of testing one commit.

    Attributes:
        mark: the verdict for git.
        reason: the reason for the verdict, in one line; empty if the commit is good.
        release: the release of the commit's kernel; empty if the kernel could not be built.
        run: the run of the tests; None if the tests did not run.
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
    """Build the kernel of a tree, run tests with it, and judge the commit.

    The commit is bad only if a test failed or a guest died in a test. It is good only if a test
    that passed used a guest. It is skipped if the kernel does not compile or boot, or if the
    harness could not do its work.

    Args:
        tree: the kernel tree.
        tests: arguments for pytest; see `pytest_process.run_tests`.
        options: the options of the guests; if `kernel` or `to` is None, it is the tree's kernel.
        hops: how many live updates a test makes if it can make several.
        limit: seconds after which the tests are ended.
        match: a pattern that the text of a failure must match; if no failure matches, the commit
            is skipped.
        unbootable: the mark for a kernel that does not boot.
        output: the file for pytest's output; None to keep the output in the result.
    """
    own = replace(options, kernel=str(tree), to=None)
    try:
        # Find the other kernels first, so that a mistake in their names does not cost a build.
        others = [options.find(other, str(tree)) for other in (options.kernel, options.to) if other]
        built = own.find_kernel()
    except HarnessError as error:
        return Step(Mark.SKIP, f"there is no kernel to test: {error}")
    try:
        # If the tests boot another kernel and jump to this one, they do not show whether this
        # kernel boots at all. Boot it once.
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
    """Boot a guest, and return what it died of; empty if it booted.

    Raises:
        HarnessError: the guest could not be started, or QEMU ended.
    """
    try:
        with closing(guest.__enter__()):
            return ""
    except GuestCrash as crash:
        if crash.cause is Death.QEMU:  # the host is to blame, not the kernel
            raise HarnessError(str(crash)) from crash
        return f"{crash.cause.value}: {crash.reason}"


def _judge(run: PytestRun, match: re.Pattern[str] | None, unbootable: Mark) -> Step:
    if run.outcome is Outcome.PASSED:
        if any(verdict.outcome is Outcome.PASSED and verdict.guests for verdict in run.verdicts):
            return Step(Mark.GOOD, "")
        return Step(Mark.SKIP, "no test that passed used a guest")
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
    """Return the reasons and errors of a failed test and its failed subtests, to match against."""
    failed = [each for each in verdict.subtests if each.outcome in FAILURES]
    return "\n".join(f"{each.reason}\n{_error_lines(each.text)}" for each in [verdict, *failed])


def _error_lines(text: str) -> str:
    """Return the lines of a failure's text that say what was raised.

    pytest marks these lines with "E". Its other lines quote the test's source, which contains the
    messages of all assertions, so they must not match. A text without marked lines does not come
    from pytest's traceback, and is returned whole.
    """
    return "\n".join(re.findall("^E .*", text, re.MULTILINE)) or text
