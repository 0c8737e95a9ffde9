"""Build the sdist of this checkout, the same bytes each time: `make sdist`.

setuptools writes the times and the owners of the files as it finds them. Here they are those of the
last commit, and nobody's.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    refuse_changes()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", temporary]
        subprocess.run([*build, ROOT], check=True, stdout=subprocess.DEVNULL)
        [built] = Path(temporary).glob("*.tar.gz")
        path = folder / built.name
        path.write_bytes(repack(built.read_bytes(), _time_of_last_commit()))
    print(path)


def repack(data: bytes, time: int) -> bytes:
    """Return an archive with the same files, in the order of their names, all of one time.

    Args:
        data: a .tar.gz.
        time: the time, in seconds since 1970.
    """
    output = io.BytesIO()
    # The header of gzip has a name and a time of its own.
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as source,
        gzip.GzipFile(filename="", mode="wb", fileobj=output, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid = time, 0, 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            archive.addfile(member, source.extractfile(member) if member.isfile() else None)
    return output.getvalue()


def refuse_changes() -> None:
    """Exit if the checkout has changes that are not committed: a release is what a commit says."""
    if changes := _git("status", "--porcelain"):
        sys.exit(f"commit or remove first:\n{changes}")


def _time_of_last_commit() -> int:
    return int(_git("log", "-1", "--format=%ct"))


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
