"""Run test programs in guests: the kernel's selftests, and other programs that report in KTAP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyluo.errors import RequestError
from pyluo.guest import commands
from pyluo.vm import progress
from pyluo.vm.errors import GuestCrash, GuestFailure, HarnessError
from pyluo.vm.results import ktap_reader, program
from pyluo.vm.results.program import EndedProgram
from pyluo.vm.results.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyluo.vm.machine.vm import VM
    from pyluo.vm.run.selftests import Selftest

__all__ = ["run_program", "run_selftests", "run_staged"]

_NOT_RUNNABLE, _NOT_FOUND, _SIGNALLED = 126, 127, 128  # the exit statuses of shells
_POLL_INTERVAL = 0.5  # seconds between two updates of the progress bar of a program
# The output of a program also goes to the console, because the console's text is kept if the guest
# dies. `tee` runs with real-time priority, so that the last lines before a death, which say most,
# get to the console if possible. stdout and stderr stay apart: a program that does not flush its
# stdout writes it in blocks, and a line of stderr would come in the middle of a result.
_TEE = "chrt --fifo 1 tee /dev/console"
_RELAY = [
    "bash", "-o", "pipefail", "-c",
    f'{{ "$@" 2>&1 >&3 3>&- | {_TEE} >&2 3>&-; }} 3>&1 | {_TEE}',
    "bash",
]  # fmt: skip


def run_program(
    vm: VM, command: Sequence[str | os.PathLike[str]], timeout: float
) -> tuple[Verdict, GuestCrash | None]:
    """Run a program that reports in KTAP in a guest.

    Args:
        vm: the guest; it runs on afterwards, unless it dies.
        command: the program and its arguments.
        timeout: seconds after which the program is killed.

    Returns:
        The verdict on the program; and the guest's death if that ended the program, else None.

    Raises:
        HarnessError: the guest cannot run the program.
    """
    words = [os.fspath(word) for word in command]
    ended = _run(vm, words, timeout)
    return program.judge(os.path.basename(words[0]), ended), ended.crash


def run_selftests(
    selftests: Sequence[Selftest], boot: Callable[[], VM], *, timeout: float
) -> Iterator[Verdict]:
    """Run each selftest in a fresh guest, and yield its verdict when it has ended.

    Args:
        selftests: the selftests to run.
        boot: returns a new guest, not booted yet, with the kernel that it jumps to.
        timeout: seconds for each program, or for each stage of a staged one.

    Raises:
        HarnessError: a guest could not be started, or cannot run the program.
    """
    for number, selftest in enumerate(selftests, 1):
        title = f"{selftest.name}, {number} of {len(selftests)}"
        with progress.bar(title, None) as move_bar:
            verdict = _run_selftest(selftest, boot, timeout, move_bar)
        yield verdict


def run_staged(vm: VM, selftest: Selftest, timeout: float) -> Verdict:
    """Run both stages of a staged selftest with a live update between them; return the verdict.

    The result of a stage is only its exit status.

    Args:
        vm: the guest; it runs on afterwards, unless it dies.
        selftest: the selftest.
        timeout: seconds for each stage.

    Raises:
        HarnessError: the guest cannot run the program.
    """
    for stage in (1, 2):
        if stage == 2:
            try:
                vm.live_update()
            except RequestError as error:
                return Verdict(selftest.name, Outcome.FAILED, f"no live update: {error}")
        ended = _run(vm, [str(selftest.path), "-s", str(stage)], timeout)
        report = ktap_reader.parse(ended.output)
        verdict = Verdict(
            selftest.name,
            Outcome.FAILED,
            "; ".join([f"stage {stage}", *filter(None, [report.bailed_out]), ended.ending]),
            "\n".join([*report.diagnostics, *ended.stderr.splitlines()]),
        )
        if ended.crash:
            alive = Verdict(selftest.name, Outcome.PASSED)
            return program.with_failure(alive, ended.crash, report.diagnostics)
        # Stage 2 may not skip: stage 1 has run, so live update is available.
        if ended.status == program.SKIP_STATUS and stage == 1:
            return Verdict(selftest.name, Outcome.SKIPPED, report.skip_reason)
        if ended.ending:
            return verdict
    return Verdict(selftest.name, Outcome.PASSED)


def _run_selftest(
    selftest: Selftest,
    boot: Callable[[], VM],
    timeout: float,
    move_bar: progress.MoveBar,
) -> Verdict:
    verdict = Verdict(selftest.name, Outcome.PASSED)
    try:
        with boot() as vm:
            if selftest.staged:
                verdict = run_staged(vm, selftest, timeout)
            else:
                with _show_progress(vm, move_bar):
                    ended = _run(vm, [str(selftest.path)], timeout)
                verdict = program.judge(selftest.name, ended)
    except GuestFailure as failure:
        # The end of the block checks the guest. The kernel may have complained although the program
        # passed.
        return program.with_failure(verdict, failure)
    return verdict


@contextmanager
def _show_progress(vm: VM, move_bar: progress.MoveBar) -> Iterator[None]:
    """In the block, show how many results a program has printed.

    They are counted on the console, because `VM.run` returns the output only at the end.
    """
    start = len(vm.console)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_INTERVAL):
            report = ktap_reader.parse(vm.console[start:])
            move_bar(len(report.results), report.planned)

    follower = threading.Thread(target=follow, name="pyluo-progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _run(vm: VM, command: list[str], timeout: float) -> EndedProgram:
    start = len(vm.console)
    try:
        if vm.call(commands.find_program, command[0], os.getcwd()) is None:
            raise HarnessError(
                f"the guest cannot run {command[0]}",
                f"there is no such program in the guest's PATH, {commands.PATH}: give a path"
                if "/" not in command[0]
                else "there is no such file that can be executed in the guest",
            )
        done = vm.run([*_RELAY, *command], timeout)
    except GuestCrash as crash:
        return EndedProgram(vm.console[start:], "the guest crashed", crash=crash)
    except subprocess.TimeoutExpired as error:
        return EndedProgram(
            _decode(error.output), f"it still ran after {timeout:g} s", stderr=_decode(error.stderr)
        )
    # The shell's own words, for example if a script's interpreter is missing.
    shown = re.escape(os.fsencode(command[0]))
    refused = re.match(rb"bash: line \d+: (" + shown + rb": .*)", done.stderr)
    if done.returncode in (_NOT_RUNNABLE, _NOT_FOUND) and refused:
        raise HarnessError(f"the guest cannot run {command[0]}", _decode(refused[1]))
    ending = _describe_status(done.returncode)
    stderr = _decode(done.stderr)
    return EndedProgram(_decode(done.stdout), ending, done.returncode, stderr=stderr)


def _decode(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


def _describe_status(status: int) -> str:
    try:
        return f"killed by {signal.Signals(status - _SIGNALLED).name}"
    except ValueError:
        return f"exit status {status}" if status else ""
