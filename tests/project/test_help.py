"""The help of each command: a sentence, and examples that the parser itself takes."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest

from pyluo.cli import make_parser
from pyluo.cli.parsers import walk

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


PARSERS = {parser.prog: parser for parser in walk(make_parser())}


def examples(parser: argparse.ArgumentParser) -> list[str]:
    shown = (parser.epilog or "").removeprefix("examples:\n").partition("\n\n")[0]
    return [line.strip() for line in shown.splitlines()]


def command_lines(example: str) -> Iterator[list[str]]:
    """Yield the words behind each `pyluo` of an example, which is a line for a shell."""
    for part in re.split(r"&&|>", example):
        words = shlex.split(part, comments=True)
        if "pyluo" in words:
            yield words[words.index("pyluo") + 1 :]


@pytest.mark.parametrize("name", PARSERS)
def test_the_help_says_what_the_command_does_and_shows_how(name: str) -> None:
    parser = PARSERS[name]
    assert re.fullmatch(r"[A-Z][^.]*\.( .+\.)?", parser.description or "", re.DOTALL)
    assert (parser.epilog or "").startswith("examples:\n")
    shown = examples(parser)
    assert len(shown) >= 2
    assert any(name in example for example in shown)
    for example in shown:
        lines = list(command_lines(example))
        assert lines, example
        for words in lines:
            assert make_parser(words).parse_args(words).run, example
    text = parser.format_help()
    for example in shown:
        assert f"  {example}\n" in text  # not wrapped


def test_the_commands_come_in_the_order_in_which_one_meets_them() -> None:
    names = [name.removeprefix("pyluo ") for name in PARSERS if name.count(" ") == 1]
    assert names == [
        *("demo", "doctor", "status", "probe", "save", "restore", "discard", "kexec", "update"),
        *("vm", "completion"),
    ]
