"""What the parsers of all commands have in common: a summary, and examples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = object

__all__ = ["Subparsers", "add_command", "walk"]


def add_command(
    subparsers: Subparsers, name: str, summary: str, *examples: str, more: str = "", notes: str = ""
) -> argparse.ArgumentParser:
    """Add a command, or an action of one, and return its parser.

    Args:
        subparsers: what `add_subparsers` returned: an object to which commands are added.
        name: the name of the command.
        summary: what the command does, as a sentence without a period.
        examples: whole command lines, as typed in a shell.
        more: further sentences for the help of the command itself.
        notes: text behind the examples.
    """
    shown = "\n".join(f"  {example}" for example in examples)
    # argparse only wraps lines in the default formatter, which would join the examples.
    return subparsers.add_parser(
        name,
        help=summary[0].lower() + summary[1:],
        description=f"{summary}.{' ' * bool(more)}{more}",
        epilog=f"examples:\n{shown}\n{notes and chr(10)}{notes}",
        formatter_class=_Formatter,
    )


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of the commands of a parser, and of their actions, in the help's order."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from walk(command)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are, and wraps descriptions."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:\n"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
