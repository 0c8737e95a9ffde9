"""Progress of long work: on a terminal, and nowhere else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Console", "Reached", "bar", "say"]


class Console(rich.console.Console):
    """A console that does not end the program if nobody reads what it prints."""

    def on_broken_pipe(self) -> None:
        """Fails as any other print does."""
        raise BrokenPipeError


_console = Console(stderr=True)


class Reached(Protocol):
    """Sets how far the work is."""

    def __call__(self, done: float, total: float | None = None) -> None:
        """Moves the bar.

        Args:
            done: so far.
            total: how far it goes, where that was not known when the bar was made.
        """


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

        def reached(done: float, total: float | None = total) -> None:
            # An estimate can be too low: then the end moves along.
            goal = total if total is None else max(total, done)
            progress.update(task, completed=done, total=goal)

        yield reached
