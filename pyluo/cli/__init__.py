"""The `pyluo` command. Each subcommand is a module here; parsing is argparse's work.

Exit status: 0 passed; 1 a test failed, the guest crashed or the kernel refused; 2 usage; 69 the
harness could not do its work.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from pyluo.cli import demo, kexec, probe, status, vm
from pyluo.cli.exit import FAILED, INTERRUPTED, UNAVAILABLE
from pyluo.errors import LuoError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="pyluo", description="Live update of the Linux kernel.")
    parser.add_argument("--version", action="version", version=f"pyluo {version('pyluo')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (status, probe, kexec, vm, demo):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except LuoError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("qemu", "rich", "pyroute2", "pytest"):
            raise
        return _complain(f"this needs {error.name}: pip install 'pyluo[vm]'", UNAVAILABLE)
    except Exception as error:
        return _complain(str(error), _harness_status(error))
    return code


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
