"""Check that the sdist and the wheel that are built from the checkout are complete."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

from release import sdist

ROOT = Path(__file__).parents[2]
SCRIPT = (
    "import pyluo; from pyluo.vm.kernels import catalogue; from pathlib import Path;"
    "print(Path(pyluo.__file__).parent); print(*sorted(catalogue.catalogue()));"
    "memfd = pyluo.Memfd.create('ram', 4096); memfd.close()"
)


def test_a_wheel_made_from_the_sdist_works_on_its_own(tmp_path: Path) -> None:
    # Leave out what an earlier build left here, because setuptools would pack it.
    build_output = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so")
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=build_output)
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--outdir={tmp_path}",
        os.fspath(checkout),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as source:
        packed = {Path(*Path(name).parts[1:]) for name in source.getnames()}
    assert _sources() - packed == set()
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": os.fspath(tmp_path / "installed")}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    folder, kernels = ran.stdout.splitlines()
    assert folder == os.fspath(tmp_path / "installed" / "pyluo")
    assert {"stable", "previous", "debug"} <= set(kernels.split())


def test_the_sdist_is_the_same_whenever_and_wherever_it_is_made() -> None:
    archives = []
    for time, owner in ((1, 1000), (2, 0)):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w:gz") as archive:
            for name in ("b", "a")[:: 1 if owner else -1]:
                member = tarfile.TarInfo(name)
                member.mtime, member.uid, member.uname, member.size = time, owner, f"u{owner}", 5
                member.mode = 0o640 if owner else 0o644
                archive.addfile(member, io.BytesIO(b"hello"))
        archives.append(made.getvalue())
    assert archives[0] != archives[1]
    first, second = (sdist.repack(each, time=1_700_000_000) for each in archives)
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as archive:
        members = archive.getmembers()
        assert [(each.name, each.mtime, each.mode) for each in members] == [
            ("a", 1_700_000_000, 0o644), ("b", 1_700_000_000, 0o644),
        ]  # fmt: skip
        assert archive.extractfile("b").read() == b"hello"  # type: ignore[union-attr]


def test_the_newest_changes_are_those_of_this_version_and_the_next_ones_can_be_added() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    released = re.findall(r"^## (\S+), [\d-]+$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == project["version"] == version("pyluo")
    kinds = {path.name.split(".")[-2] for path in (ROOT / "changes").glob("+*")}
    assert kinds <= {"broken", "new", "mended"}
    draft = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9"]
    done = subprocess.run(draft, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "## 9.9.9" in done.stdout


def _sources() -> set[Path]:
    """Return the files that the Makefile and the README need besides the package."""
    return {
        path
        for folder in (
            "benchmarks",
            "changes",
            "docs",
            "examples",
            "kernel-config",
            "release",
            "tests",
            "vm-tests",
        )
        for path in (each.relative_to(ROOT) for each in (ROOT / folder).rglob("*.*"))
        if not any(part in ("__pycache__", "build") or part[0] == "." for part in path.parts)
        and path.suffix not in (".elf", ".cpio")  # what the examples' Makefiles make
    }
