"""Build the wheels of this checkout, and use them: `make wheel`.

There is one for x86-64 and one for aarch64, for every Python from 3.11 on: the extension module
uses the stable ABI. The second is made by a cross compiler, and only looked at. The first is
installed, without this checkout, for each Python that is found, and used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from release import sdist

ROOT = Path(__file__).parents[1]
# The packages of Debian with the compiler for each.
ARCHITECTURES = {
    "x86_64": "gcc libc6-dev",
    "aarch64": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
}
PYTHONS = [f"python3.{minor}" for minor in range(11, 15)]
USE = """
import pyluo
with pyluo.Memfd.create("ram", 4096) as memfd:
    memfd.write(b"used", 0)
    print(pyluo.__file__, memfd.read(4, 0).decode())
"""


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    sdist.refuse_changes()
    folder.mkdir(parents=True, exist_ok=True)
    wheels = {name: build(name, folder) for name in ARCHITECTURES}
    for wheel in wheels.values():
        print(wheel)
    used = [python for python in PYTHONS if (path := find(python)) and use(path, wheels["x86_64"])]
    print(f"installed and used: {', '.join(used)}")
    if missing := sorted(set(PYTHONS) - set(used)):
        print(f"not tried, as they are not installed: {', '.join(missing)}")
    if not used:
        sys.exit("no Python was found")


def build(architecture: str, folder: Path) -> Path:
    """Build a wheel, name it after the oldest glibc that it runs with, and return its path."""
    compiler = f"{architecture}-linux-gnu-gcc"
    if shutil.which(compiler) is None:
        sys.exit(f"{compiler} is missing: apt install {ARCHITECTURES[architecture]}")
    environment = os.environ | {
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared",
        "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
    }
    with tempfile.TemporaryDirectory() as temporary:
        # What an earlier build left in the checkout may be of another architecture.
        source = Path(temporary, "source")
        subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
        command = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            temporary,
        ]
        subprocess.run([*command, source], check=True, env=environment, stdout=subprocess.DEVNULL)
        [built] = Path(temporary).glob("*.whl")
        show = [sys.executable, "-m", "auditwheel", "show", os.fspath(built)]
        shown = subprocess.run(show, check=True, capture_output=True, text=True, env=environment)
        found = re.search(rf'"(manylinux_\d+_\d+_{architecture})"', shown.stdout)
        if found is None:
            sys.exit(f"{built.name} is no manylinux wheel: {shown.stdout}")
        rename = [sys.executable, "-m", "wheel", "tags", "--platform-tag", found[1], built]
        renamed = subprocess.run(rename, check=True, capture_output=True, text=True).stdout.strip()
        return Path(shutil.move(built.with_name(renamed), folder / renamed))


def find(python: str) -> str | None:
    """Return the path of a Python that runs; shims of version managers may be there without one."""
    path = shutil.which(python)
    if path is None or subprocess.run([path, "-c", ""], capture_output=True).returncode:
        return None
    return path


def use(python: str, wheel: Path) -> bool:
    """Install a wheel into a new environment, and use it there."""
    with tempfile.TemporaryDirectory() as temporary:
        environment = Path(temporary, "environment")
        subprocess.run([python, "-m", "venv", environment], check=True)
        pip = os.fspath(environment / "bin" / "pip")
        install = [pip, "install", "-q", "--disable-pip-version-check", os.fspath(wheel)]
        subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
        used = subprocess.run(
            [environment / "bin" / "python", "-c", USE],
            check=True,
            capture_output=True,
            text=True,
            cwd=temporary,
        )
        file, word = used.stdout.split()
        if not file.startswith(temporary) or word != "used":
            sys.exit(f"{python}: {used.stdout}")
    return True


if __name__ == "__main__":
    main()
