"""The console on which the harness prints for its user. Imported only to print: rich is large."""

from __future__ import annotations

import rich.console

__all__ = ["Console"]


class Console(rich.console.Console):
    """A console of rich that raises an error if nobody reads its output, where rich would exit."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, as `print` does."""
        raise BrokenPipeError
