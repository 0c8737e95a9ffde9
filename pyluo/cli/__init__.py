"""The `pyluo` command. Each subcommand is a module here; parsing is argparse's work.

Exit status: 0 passed; 1 a test failed, the guest crashed or the kernel refused; 2 usage; 69 the
harness could not do its work. That of `pyluo vm bisect` is for `git bisect run`: 0, 1 or 125.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pyluo.cli import demo, kexec, probe, saved, status, vm
from pyluo.cli.exit import FAILED, INTERRUPTED, UNAVAILABLE, USAGE
from pyluo.cli.vm.bisect import UNTESTABLE
from pyluo.errors import LuoError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_OF_THE_HARNESS = frozenset({"jinja2", "pyroute2", "pytest", "qemu", "rich"})  # pyluo[vm] has them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="pyluo", description="Live update of the Linux kernel.")
    parser.add_argument("--version", action=_Version, help="show pyluo's version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (status, probe, saved, kexec, vm, demo):
        command.add_parser(commands)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = parser.parse_args(words)
    except SystemExit as end:
        # To `git bisect run` the usual status would say that the kernel is bad.
        if end.code == USAGE and words[:2] == ["vm", "bisect"]:
            raise SystemExit(UNTESTABLE) from None
        raise
    try:
        code: int = arguments.run(arguments)
    except LuoError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_THE_HARNESS:
            raise
        return _complain(f"this needs {error.name}: pip install 'pyluo[vm]'", UNAVAILABLE)
    except Exception as error:
        return _complain(str(error), _harness_status(error))
    return code


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
    print(f"pyluo: {text}", file=sys.stderr)
    return code
