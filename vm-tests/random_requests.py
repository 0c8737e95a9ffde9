"""Settings for state machines whose every step is a request to a guest."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

__all__ = ["settings_of_run"]


def settings_of_run(runs: int, length: int, *, first: bool, usual: bool) -> settings:
    """Return the settings for some runs of a state machine.

    Args:
        runs: how many runs.
        length: the steps of a run.
        first: whether these are the first runs of a test.
        usual: whether no more steps than usual are wanted: then the first runs are the same in
            each test run, and a failure is not shrunk, which would take many jumps.
    """
    return settings(
        max_examples=runs,
        stateful_step_count=length,
        derandomize=first and usual,
        database=None,
        deadline=None,
        phases=[Phase.generate] if usual else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
