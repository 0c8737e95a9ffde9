"""The `pyluo` command. Each subcommand is a module here; parsing is argparse's work.

Exit status: 0 passed; 1 a test failed, the guest crashed or the kernel refused; 2 usage; 69 the
harness could not do its work. That of `pyluo vm bisect` is for `git bisect run`: 0, 1 or 125.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from pyluo.cli import demo, kexec, probe, saved, status, vm
from pyluo.cli.exit import FAILED, INTERRUPTED, PASSED, UNAVAILABLE, USAGE
from pyluo.cli.vm.bisect import UNTESTABLE
from pyluo.errors import LuoError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_OF_THE_HARNESS = frozenset({"jinja2", "pyroute2", "pytest", "qemu", "rich"})  # pyluo[vm] has them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    # To `git bisect run` the usual statuses would say that the kernel is bad.
    bisects = words[:2] == ["vm", "bisect"]
    lost = UNTESTABLE if bisects else UNAVAILABLE
    try:
        return _printed(_run(words), lost)
    except SystemExit as end:
        code = UNTESTABLE if bisects and end.code == USAGE else int(end.code or PASSED)
        raise SystemExit(_printed(code, lost)) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyluo", description="Live update of the Linux kernel.")
    parser.add_argument("--version", action=_Version, help="show pyluo's version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (status, probe, saved, kexec, vm, demo):
        command.add_parser(commands)
    return parser


def _run(words: Sequence[str]) -> int:
    try:
        arguments = _parser().parse_args(words)
        code: int = arguments.run(arguments)
    except LuoError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:  # who read what it prints has gone
        return UNAVAILABLE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_THE_HARNESS:
            raise
        return _complain(f"this needs {error.name}: pip install 'pyluo[vm]'", UNAVAILABLE)
    except Exception as error:
        return _complain(str(error), _harness_status(error))
    return code


def _printed(code: int, lost: int) -> int:
    """The status of a command, of which nothing waits to be printed any more.

    Args:
        code: of the command.
        lost: what it is instead if that is a pass and could not be printed.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            # Python would try once more as it exits, and make the status 120.
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), stream.fileno())
            code = code or lost
            if not isinstance(error, BrokenPipeError):
                _complain(f"not all could be printed: {error.strerror}", code)
    return code


class _Parser(argparse.ArgumentParser):
    """Older Pythons' parser fails by another error where it cannot print what is wrong."""

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except OSError:
            raise SystemExit(USAGE) from None


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that costs as much as the rest of a command."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"pyluo {version('pyluo')}")
        parser.exit()


def _harness_status(error: Exception) -> int:
    """The status of a run that the harness or its host ended; any other exception is a bug."""
    from pyluo.vm.errors import GuestCrash, HarnessError

    if isinstance(error, GuestCrash):
        return FAILED
    if isinstance(error, HarnessError | OSError):
        return UNAVAILABLE
    raise error


def _complain(text: str, code: int) -> int:
    with suppress(OSError):
        print(f"pyluo: {text}", file=sys.stderr)
    return code
