"""`pyluo save`, `pyluo restore` and `pyluo discard`: carry files over a live update."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo import saved
from pyluo.cli.exit import PASSED, USAGE
from pyluo.cli.parsers import add_command
from pyluo.errors import RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the commands `save`, `restore` and `discard`."""
    save = add_command(
        subparsers,
        "save",
        "Preserve copies of files for the next kernel",
        "pyluo save notes /etc/hosts ~/notes.txt",
        "pyluo save vm0 disk.img && pyluo kexec reboot --require vm0",
        more="A keeper holds them until `pyluo kexec reboot`.",
    )
    save.add_argument("name", metavar="NAME", help="the name of the session; 1 to 63 bytes")
    save.add_argument("files", type=Path, nargs="+", metavar="FILE")
    save.set_defaults(run=_save)
    restore = add_command(
        subparsers,
        "restore",
        "Write the saved files to a folder, after the jump",
        "pyluo restore notes ~/restored",
        "pyluo restore vm0 /var/lib/vms",
        more="Their contents are compared with checksums; if this fails, it can be run again.",
    )
    restore.add_argument("name", metavar="NAME")
    restore.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="the folder to write to; created if it does not exist",
    )
    restore.add_argument("--force", action="store_true", help="replace files of the same names")
    restore.set_defaults(run=_restore)
    discard = add_command(
        subparsers,
        "discard",
        "Drop the saved files",
        "pyluo discard notes",
        "pyluo discard vm0 --force",
        more="Before the jump or after it. What was saved is lost.",
    )
    discard.add_argument("name", metavar="NAME")
    discard.add_argument(
        "--force",
        action="store_true",
        help="discard the session even if `save` did not make it",
    )
    discard.set_defaults(run=_discard)
    for parser in (save, restore, discard):
        parser.add_argument("--json", action="store_true", help="print JSON")


def _save(arguments: argparse.Namespace) -> int:
    try:
        with _progress_bar("saving", sum(_file_size(path) for path in arguments.files)) as report:
            files, kept_by = saved.save(arguments.name, arguments.files, report=report)
    except RequestError:
        raise
    except ValueError as error:
        print(f"pyluo: {error}", file=sys.stderr)
        return USAGE
    if arguments.json:
        _print_json(
            {"session": arguments.name, "kept_by": kept_by, "files": [asdict(f) for f in files]}
        )
    else:
        _print_files(files)
        print(f"Session {arguments.name!r} is kept by {kept_by} until the jump.")
    return PASSED


def _restore(arguments: argparse.Namespace) -> int:
    with _progress_bar("restoring", None) as report:
        files = saved.restore(
            arguments.name, arguments.folder, force=arguments.force, report=report
        )
    if arguments.json:
        _print_json({"session": arguments.name, "files": [asdict(file) for file in files]})
    else:
        _print_files(files)
        print(f"Session {arguments.name!r} is finished.")
    return PASSED


def _discard(arguments: argparse.Namespace) -> int:
    direction = saved.discard(arguments.name, force=arguments.force)
    if arguments.json:
        _print_json({"session": arguments.name, "direction": direction})
    else:
        print(f"The {direction} session {arguments.name!r} is discarded, with all that was in it.")
    return PASSED


def _print_files(files: list[saved.SavedFile]) -> None:
    for file in files:
        name = file.name if file.name.isprintable() else repr(file.name)
        print(f"{file.sha256}  {file.mode:04o}  {file.size:>12}  {name}")


def _print_json(data: dict[str, object]) -> None:
    print(json.dumps(data, indent=2))


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _progress_bar(what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Return a progress bar in MiB on stderr.

    If stderr is no terminal, or rich is not installed, the progress is not shown.

    Args:
        what: the name of the work.
        total: how many bytes there are; None if that is not known.
    """
    if os.isatty(2):
        try:
            from pyluo.vm import progress
        except ModuleNotFoundError:
            pass
        else:
            return _in_mebibytes(progress.bar(f"{what}, MiB", total and total / (1 << 20)))
    return nullcontext(lambda _: None)


@contextmanager
def _in_mebibytes(
    bar: AbstractContextManager[Callable[[float], None]],
) -> Iterator[Callable[[int], None]]:
    with bar as advance:
        yield lambda done: advance(done // (1 << 20))
