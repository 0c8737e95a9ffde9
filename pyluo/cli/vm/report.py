"""`--report FILE`: an archive with all that whoever looks at a failure of a kernel will ask for."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import shlex
import sys
import tarfile
import time
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyluo.vm.machine.usage import usage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.timeline import GuestLog

__all__ = ["add_option", "written"]


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --report."""
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write an archive (.tar.gz) about the run, whatever comes of it: versions, the "
        "command, consoles, timelines, configurations of the kernels",
    )


@contextmanager
def written(path: Path | None, kernels: Sequence[Kernel | None]) -> Iterator[list[str]]:
    """Write the archive at the end of the block, however the block ends.

    The block adds to the list what came of the run, in lines.

    Args:
        path: the path of the archive; None to write none.
        kernels: the kernels that run in the block.

    Raises:
        OSError: the file cannot be written; raised at the start of the block.
    """
    outcome: list[str] = []
    if path is None:
        yield outcome
        return
    with tarfile.open(path, "w:gz") as archive:
        usage.begin_test()
        try:
            yield outcome
        except BaseException:
            outcome.append(traceback.format_exc())
            raise
        finally:
            parts = {"outcome.txt": lambda: "\n".join([*outcome, ""]), **_parts(usage.find_logs())}
            for number, kernel in enumerate(filter(None, kernels), 1):
                if kernel.config is not None:
                    name = f"kernels/{number}-{kernel.release}.config"
                    parts[name] = partial(kernel.config.read_text, errors="surrogateescape")
            for name, describe in parts.items():
                _add(archive, name, _try(describe))


def _parts(logs: Sequence[GuestLog]) -> dict[str, Callable[[], str]]:
    """Return what gives the texts of the archive about the run, by their names."""
    parts: dict[str, Callable[[], str]] = {
        "command.txt": lambda: shlex.join(["pyluo", *sys.argv[1:]]) + "\n",
        "versions.json": lambda: _to_json(_versions()),
        "host.json": _describe_host,
    }
    for number, log in enumerate(logs, 1):
        parts[f"guest-{number}/console.txt"] = partial(str, log.console)
        parts[f"guest-{number}/jumps.json"] = partial(_describe_jumps, log)
    return parts


def _try(describe: Callable[[], str]) -> str:
    """Return a text, or why there is none: what is reported must not be lost by its report."""
    try:
        return describe()
    except Exception:
        return traceback.format_exc()


def _describe_host() -> str:
    from pyluo.doctor.harness import check_harness

    return _to_json([dataclasses.asdict(check) for check in check_harness()])


def _describe_jumps(log: GuestLog) -> str:
    jumps = [dataclasses.asdict(jump) | {"blackout": jump.blackout} for jump in log.jumps]
    return _to_json({"kernel": log.kernel, "jumps": jumps})


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "pyluo": version("pyluo"),
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _to_json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def _add(archive: tarfile.TarFile, name: str, text: str) -> None:
    """Add a text to an archive, without the name of the user's folder."""
    home = os.path.expanduser("~").rstrip("/")
    data = (text.replace(f"{home}/", "~/") if home else text).encode(errors="surrogateescape")
    member = tarfile.TarInfo(f"pyluo-report/{name}")
    member.size = len(data)
    member.mtime = int(time.time())
    archive.addfile(member, io.BytesIO(data))
