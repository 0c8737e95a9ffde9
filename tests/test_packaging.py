"""What is built from the checkout is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = (
    "import pyluo; from pyluo.vm import catalogue; from pathlib import Path;"
    "print(Path(pyluo.__file__).parent); print(*sorted(catalogue.catalogue()));"
    "memfd = pyluo.Memfd.create('ram', 4096); memfd.close()"
)


def test_a_wheel_made_from_the_sdist_works_on_its_own(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--outdir={tmp_path}",
        os.fspath(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
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
