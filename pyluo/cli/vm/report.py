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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyluo.vm.machine.usage import usage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

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
def written(path: Path | None, kernels: Sequence[Kernel | None] = ()) -> Iterator[None]:
    """Write the archive at the end of the block, however the block ends.

    Args:
        path: the path of the archive; None to write none.
        kernels: the kernels that run in the block.

    Raises:
        OSError: the file cannot be written; raised at the start of the block.
    """
    if path is None:
        yield
        return
    with tarfile.open(path, "w:gz") as archive:
        usage.begin_test()
        outcome = "no exception\n"
        try:
            yield
        except BaseException:
            outcome = traceback.format_exc()
            raise
        finally:
            files = _describe_run(outcome, usage.find_logs())
            for kernel in filter(None, kernels):
                if kernel.config is not None:
                    files[f"kernels/{kernel.release}.config"] = kernel.config.read_text()
            for name, text in files.items():
                _add(archive, name, text)


def _describe_run(outcome: str, logs: Sequence[GuestLog]) -> dict[str, str]:
    """Return the texts of the archive about the run, by their names."""
    from pyluo.doctor.harness import check_harness

    checks = [dataclasses.asdict(check) for check in check_harness()]
    files = {
        "command.txt": shlex.join(["pyluo", *sys.argv[1:]]) + "\n",
        "outcome.txt": outcome,
        "versions.json": _to_json(_versions()),
        "host.json": _to_json(checks),
    }
    for number, log in enumerate(logs, 1):
        files[f"guest-{number}/console.txt"] = log.console
        jumps = [dataclasses.asdict(jump) | {"blackout": jump.blackout} for jump in log.jumps]
        files[f"guest-{number}/jumps.json"] = _to_json({"kernel": log.kernel, "jumps": jumps})
    return files


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
    data = text.replace(os.path.expanduser("~"), "~").encode(errors="surrogateescape")
    member = tarfile.TarInfo(f"pyluo-report/{name}")
    member.size = len(data)
    member.mtime = int(time.time())
    archive.addfile(member, io.BytesIO(data))
