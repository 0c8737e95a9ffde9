"""Messages on stderr, and the progress of long work: a bar on a terminal, else a line a minute."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.vm.output import Console

__all__ = ["MoveBar", "bar", "say", "status"]

_LINE_INTERVAL = 60.0  # seconds between two lines about the same work, if stderr is no terminal


class MoveBar(Protocol):
    """The type of the function that moves a progress bar."""

    def __call__(self, done: float, total: float | None = None) -> None:
        """Move the bar.

        Args:
            done: how much is done.
            total: how much there is to do in all, if that was not known when the bar was created.
        """


@cache
def _stderr() -> Console:
    # Most processes that import this module show nothing.
    from pyluo.vm.output import Console

    return Console(stderr=True)


def say(text: str) -> None:
    """Print a line for the user on stderr."""
    _stderr().print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(what: str, total: float | None) -> Iterator[MoveBar]:
    """Show a progress bar in the block; the block is given the function that moves the bar.

    If stderr is no terminal, a line says how far the work is, once a minute.

    Args:
        what: the name of the work.
        total: how much there is to do in all; None if that is not known.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = _stderr()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    if not console.is_terminal:
        yield _print_lines(what, total)
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def move_bar(done: float, total: float | None = total) -> None:
            # `total` may be an estimate that is too low.
            goal = total if total is None else max(total, done)
            progress.update(task, completed=done, total=goal)

        yield move_bar


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done in the block, and give the block what changes that.

    Nothing is left of it afterwards. If stderr is no terminal, nothing is shown.

    Args:
        what: what is being done, for instance "booting".
    """
    console = _stderr()
    if not console.is_terminal:
        yield lambda what: None
        return
    from rich.text import Text  # a plain string could contain markup

    with console.status(Text(what)) as shown:
        yield lambda what: shown.update(Text(what))


def _print_lines(what: str, total: float | None) -> MoveBar:
    """Return a function that prints a line if none was printed for a minute."""
    start = last = time.monotonic()

    def move_bar(done: float, total: float | None = total) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_INTERVAL:
            return
        last = now
        share = f"{done:g}" if total is None else f"{done:g} of {max(total, done):g}"
        say(f"{what}: {share}, after {(now - start) / 60:.0f} min")

    return move_bar
