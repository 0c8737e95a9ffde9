"""Progress of long work: on a terminal, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Reached", "bar", "say"]

Reached = Callable[[float], None]
_console = Console(stderr=True)


def say(text: str) -> None:
    """A line on what happens now, for a person."""
    _console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(what: str, total: float | None) -> Iterator[Reached]:
    """A progress bar, gone when done; the caller is given a function that sets how far it is.

    Args:
        what: the name of the work.
        total: how far it goes; None if nobody knows.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(
        *columns, console=_console, transient=True, disable=not _console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)

        def reached(done: float) -> None:
            # An estimate can be too low: then the end moves along.
            goal = total if total is None else max(total, done)
            progress.update(task, completed=done, total=goal)

        yield reached
