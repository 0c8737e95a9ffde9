"""The `pyluo` command. Each of its commands is a module of this package.

Exit status: 0 the command succeeded and all tests passed; 1 a test failed, the guest died or the
kernel refused; 2 wrong usage; 69 the harness could not do its work. `pyluo vm bisect` exits as `git
bisect run` expects: 0, 1 or 125.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from pyluo.cli.exit import FAILED, INTERRUPTED, PASSED, UNAVAILABLE, UNTESTABLE, USAGE
from pyluo.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "make_parser"]

# The commands of each module, in the order of the help. Only the module of the command that runs is
# imported, because importing all of them takes half a second in an emulated guest.
_COMMANDS = {
    "demo": ("demo",),
    "doctor": ("doctor",),
    "status": ("status",),
    "probe": ("probe",),
    "saved": ("save", "restore", "discard"),
    "kexec": ("kexec",),
    "update": ("update",),
    "vm": ("vm",),
    "completion": ("completion",),
}
# Which extra of the package installs the modules that a command may lack.
_EXTRAS = {"matplotlib": "plot", "pyroute2": "net", "shtab": "completion"} | dict.fromkeys(
    ("jinja2", "pytest", "qemu", "rich"), "vm"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    # To `git bisect run`, the usual statuses 2 and 69 would mean a bad kernel.
    is_bisection = words[:2] == ["vm", "bisect"]
    status_if_lost = UNTESTABLE if is_bisection else UNAVAILABLE
    try:
        return _flush_output(_run(words), status_if_lost)
    except SystemExit as end:
        code = UNTESTABLE if is_bisection and end.code == USAGE else int(end.code or PASSED)
        raise SystemExit(_flush_output(code, status_if_lost)) from None
    except Exception:  # a bug of pyluo's, or a module that is missing: no test has failed
        with suppress(OSError):
            traceback.print_exc()
        return status_if_lost


def make_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser for a command line; it has all commands unless the first word is one."""
    parser = _Parser(prog="pyluo", description="Live update of the Linux kernel.")
    parser.add_argument("--version", action=_Version, help="show pyluo's version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    homes = [home for home, names in _COMMANDS.items() if words and words[0] in names]
    for home in homes or _COMMANDS:
        import_module(f"pyluo.cli.{home}").add_parser(commands)
    return parser


def _run(words: Sequence[str]) -> int:
    try:
        arguments = make_parser(words).parse_args(words)
        code: int = arguments.run(arguments)
    except RequestError as error:
        return _print_error(str(error), FAILED)
    except KeyboardInterrupt:
        return _print_error("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output is gone
        return UNAVAILABLE
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _print_error(f"this needs {error.name}: pip install 'pyluo[{extra}]'", UNAVAILABLE)
    except Exception as error:
        return _print_error(str(error), _harness_status(error))
    return code


def _flush_output(code: int, status_if_lost: int) -> int:
    """Flush stdout and stderr, and return the exit status of the process.

    Args:
        code: the exit status of the command; returned unless the command passed and its output
            was lost.
        status_if_lost: the exit status if the command passed but its output could not be printed.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            # Otherwise Python would flush the stream again at exit, fail, and exit with 120.
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), stream.fileno())
            code = code or status_if_lost
            if not isinstance(error, BrokenPipeError):
                _print_error(f"the output could not be printed: {error.strerror}", code)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that exits with status 2 for wrong usage even if it cannot print its error message.

    In older versions of Python, `argparse` raises an OSError if the message cannot be printed.
    """

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except OSError:
            raise SystemExit(USAGE) from None


class _Version(argparse.Action):
    """The action of --version: prints pyluo's version.

    The version is looked up only here, because the lookup takes as long as most commands.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"pyluo {version('pyluo')}")
        parser.exit()


def _harness_status(error: Exception) -> int:
    """Return the exit status for the failure of a guest, of the harness or of the host.

    Any other error is raised again.
    """
    from pyluo.vm.errors import GuestFailure, HarnessError

    if isinstance(error, GuestFailure):
        return FAILED
    if isinstance(error, HarnessError | OSError):
        return UNAVAILABLE
    raise error


def _print_error(text: str, code: int) -> int:
    with suppress(OSError):
        print(f"pyluo: {text}", file=sys.stderr)
    return code
