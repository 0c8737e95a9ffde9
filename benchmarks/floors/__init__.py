"""The floors: programs in C that make the requests which have to be made, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pyluo._uapi
from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from pyluo.vm import VM

__all__ = ["BUILD", "compile_floor", "run_floor"]

BUILD = Path(__file__).parent.parent.parent / "build" / "bench"
_SOURCES = Path(__file__).parent
_UAPI = Path(pyluo._uapi.__file__).parent


def compile_floor(name: str) -> Path:
    """Compile a floor, and return the path of the program.

    Args:
        name: the name of its source in this folder, without the suffix.

    Raises:
        HarnessError: the compiler refused it.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    source, program = _SOURCES / f"{name}.c", BUILD / name
    command = ["gcc", "-O2", "-static", "-Wall", "-iquote", os.fspath(_UAPI), "-iquote"]
    command += [os.fspath(_SOURCES), "-o", os.fspath(program), os.fspath(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError(f"gcc refused {source}:\n{done.stderr}")
    return program


def run_floor(vm: VM, program: Path, *arguments: object, timeout: float = 600.0) -> float:
    """Run a floor in the guest, and return the seconds that it prints.

    Raises:
        HarnessError: it failed.
    """
    words = [os.fspath(program), *map(str, arguments)]
    done = vm.run(words, timeout=timeout)
    if done.returncode:
        raise HarnessError(f"{' '.join(words)} failed: {done.stderr.decode().strip()}")
    return float(done.stdout)
