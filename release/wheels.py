"""Build the wheels of this checkout, and use them: `make wheel`.

There is one for x86-64 and one for aarch64, for every Python from 3.11 on: the extension module
uses the stable ABI. The second is made by a cross compiler, and only looked at. The first is
installed, without this checkout, for each Python that is found, here or in a root for guests, and
used.

Free-threaded Pythons have no stable ABI before 3.15. If there is a python3.14t, it makes a wheel
for itself, which is then used with the global lock off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import HarnessError, Root
from release import sdist

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[1]
# The packages of Debian with the compiler for each.
ARCHITECTURES = {
    "x86_64": "gcc libc6-dev",
    "aarch64": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
}
PYTHONS = [f"python3.{minor}" for minor in range(11, 15)]
FREE_THREADED = "python3.14t"
GLIBC = 2, 17
USE = """
import sys
import warnings
warnings.simplefilter("error")  # of an extension module that enables the lock again
import pyluo
assert "t" not in sys.abiflags or not sys._is_gil_enabled()
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
    used = [python for python in PYTHONS if use(python, wheels["x86_64"])]
    if python := find(FREE_THREADED):
        wheel = build_free_threaded(python, folder)
        print(wheel)
        use(FREE_THREADED, wheel)
        used.append(FREE_THREADED)
    print(f"installed and used: {', '.join(used)}")
    if missing := [python for python in [*PYTHONS, FREE_THREADED] if python not in used]:
        print(f"not tried, as they are not installed: {', '.join(missing)}")
    if FREE_THREADED in missing:
        print(f"there is no wheel for {FREE_THREADED}: with it in PATH, make wheel makes one")
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
        source = clone(temporary)
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
        return move(temporary, folder, architecture, environment)


def build_free_threaded(python: str, folder: Path) -> Path:
    """Build a wheel for a free-threaded Python of x86-64, and return its path."""
    with tempfile.TemporaryDirectory() as temporary:
        environment = Path(temporary, "environment")
        subprocess.run([python, "-m", "venv", environment], check=True)
        pip = os.fspath(environment / "bin" / "pip")
        build = [pip, "wheel", "-q", "--no-deps", "-w", temporary]
        subprocess.run([*build, clone(temporary)], check=True)
        return move(temporary, folder, "x86_64", os.environ)


def clone(folder: str) -> Path:
    """Return the folder of a clone of the checkout, without what earlier builds left in it."""
    source = Path(folder, "source")
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    return source


def move(built_in: str, folder: Path, architecture: str, environment: Mapping[str, str]) -> Path:
    """Name the only wheel in a folder after the oldest glibc that it runs with, and move it.

    That glibc must be no newer than that of any system which is still in use.
    """
    [built] = Path(built_in).glob("*.whl")
    show = [sys.executable, "-m", "auditwheel", "show", os.fspath(built)]
    shown = subprocess.run(show, check=True, capture_output=True, text=True, env=environment)
    found = re.search(rf'"(manylinux_(\d+)_(\d+)_{architecture})"', shown.stdout)
    if found is None or (int(found[2]), int(found[3])) > GLIBC:
        sys.exit(f"{built.name} is no wheel for glibc {'.'.join(map(str, GLIBC))}: {shown.stdout}")
    rename = [sys.executable, "-m", "wheel", "tags", "--platform-tag", found[1], built]
    renamed = subprocess.run(rename, check=True, capture_output=True, text=True).stdout.strip()
    return Path(shutil.move(built.with_name(renamed), folder / renamed))


def find(python: str) -> str | None:
    """Return the path of a Python that runs; shims of version managers may be there without one.

    A free-threaded Python may also be installed under the name of the usual one.
    """
    path = shutil.which(python)
    flags = "t" if python == FREE_THREADED else ""
    check = f"import sys; sys.exit(sys.abiflags != {flags!r})"
    if path is None or subprocess.run([path, "-c", check], capture_output=True).returncode:
        return None
    return path


def find_in_root(python: str) -> list[str]:
    """Return the command that runs a Python of a root for guests; empty if the root has not it."""
    try:
        root = Root.find("sid").folder
    except HarnessError as error:
        print(f"{python} is not in a root for guests: {error}")
        return []
    binary, libraries = root / "usr/bin" / python, root / "usr/lib/x86_64-linux-gnu"
    if not binary.exists():
        return []
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    return [os.fspath(loader), "--library-path", os.fspath(libraries), os.fspath(binary)]


def use(python: str, wheel: Path) -> bool:
    """Install a wheel for a Python and use it; return whether that Python was found.

    A Python of this machine gets a virtual environment. That of a root has no pip, and gets a
    folder that pip of this process fills.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "environment")
        quietly = ["install", "-q", "--disable-pip-version-check"]
        if path := find(python):
            subprocess.run([path, "-m", "venv", place], check=True)
            command = [os.fspath(place / "bin" / "python"), "-I", "-c", USE]
            install = [os.fspath(place / "bin" / "pip"), *quietly]
        elif in_root := find_in_root(python):
            command = [
                *in_root,
                "-I",
                "-S",
                "-c",
                f"import sys; sys.path.append({str(place)!r}){USE}",
            ]
            install = [sys.executable, "-m", "pip", *quietly, "--target", os.fspath(place)]
            version = python.removeprefix("python")
            install += ["--python-version", version, "--only-binary", ":all:"]
        else:
            return False
        installed = subprocess.run([*install, os.fspath(wheel)], capture_output=True, text=True)
        if installed.returncode:
            sys.exit(f"{wheel.name} cannot be installed for {python}: {installed.stderr}")
        used = subprocess.run(command, check=True, capture_output=True, text=True, cwd=temporary)
        file, word = used.stdout.split()
        if not file.startswith(temporary) or word != "used":
            sys.exit(f"{python}: {used.stdout}")
    return True


if __name__ == "__main__":
    main()
