"""Progress bars for long work, shown on a terminal only, and messages."""

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
        """Raise the error, as `print` does."""
        raise BrokenPipeError


_console = Console(stderr=True)


class Reached(Protocol):
    """A function that sets how far the work has come."""

    def __call__(self, done: float, total: float | None = None) -> None:
        """Move the bar.

        Args:
            done: how much is done.
            total: how much there is to do, if that was not known when the bar was made.
        """


def say(text: str) -> None:
    """Print a line for the user on stderr."""
    _console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(what: str, total: float | None) -> Iterator[Reached]:
    """Show a progress bar in the block, which is given the function that moves it.

    Args:
        what: the name of the work.
        total: how much there is to do; None if that is not known.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(
        *columns, console=_console, transient=True, disable=not _console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)

        def reached(done: float, total: float | None = total) -> None:
            # `total` may be an estimate that is too low.
            goal = total if total is None else max(total, done)
            progress.update(task, completed=done, total=goal)

        yield reached
