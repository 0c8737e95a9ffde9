"""State machines whose every step is a request to a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pyluo.vm import progress

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    from hypothesis.stateful import RuleBasedStateMachine

    Answers = Counter[tuple[str, str]]

__all__ = ["find_rare", "run"]

_BATCH = 25  # runs


def run(
    machine: type[RuleBasedStateMachine],
    answers: Answers,
    least: Mapping[tuple[str, str], int],
    *,
    steps: int,
    usual: int,
    length: int,
) -> None:
    """Run a state machine, and say every thousand steps how far it is.

    Args:
        machine: the state machine.
        answers: what its steps were and how they were answered, which the machine counts.
        least: how often each answer must occur. Requests that the wanted number of steps made too
            seldom may come in up to three times as many.
        steps: how many steps are wanted.
        usual: how many steps `make test` wants. If no more are wanted, the first runs are the same
            in each test run, and a failure is not shrunk, which would take many jumps.
        length: the steps of a run, which begins with nothing.
    """
    is_usual = steps <= usual
    while (done := answers.total()) < steps or (find_rare(answers, least) and done < 3 * steps):
        if done and not is_usual:
            progress.say(f"{machine.__module__}: {done} of {steps} steps")
        runs = max(-(-(steps - done) // length), 2)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=runs if is_usual else min(runs, _BATCH),
                stateful_step_count=length,
                derandomize=not done and is_usual,
                database=None,
                deadline=None,
                phases=[Phase.generate] if is_usual else [Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )


def find_rare(answers: Answers, least: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Return the answers that have occurred less often than they must."""
    return [key for key, count in least.items() if answers[key] < count]
