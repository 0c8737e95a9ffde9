"""Read kernels.toml, which says what each kernel that has a name is built from."""

from __future__ import annotations

import enum
import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pyluo
from pyluo.vm.errors import HarnessError

__all__ = ["KernelSpec", "Series", "catalogue", "fragments_folder", "suites"]

_CHECKOUT = Path(pyluo.__file__).parents[1]


class Series(enum.Enum):
    """One of the kernel series in Debian's archive, such as 7.3."""

    NEWEST = "newest"
    BEFORE_NEWEST = "before-newest"


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """The description of a kernel in kernels.toml.

    Attributes:
        name: the kernel's name on the command line.
        series: which series of the archive the kernel belongs to.
        candidates: whether the kernel may be a release candidate.
        fragments: the names of the Kconfig fragments, in the order in which they are merged.
    """

    name: str
    series: Series
    candidates: bool
    fragments: tuple[str, ...]


def fragments_folder() -> Path:
    """Return the folder that contains kernels.toml and the Kconfig fragments.

    It is a part of the checkout, or of the installed package.

    Raises:
        HarnessError: there is no such folder.
    """
    for folder in (_CHECKOUT / "kernel-config", Path(__file__).parent / "kernel_config"):
        if (folder / "kernels.toml").exists():
            return folder
    raise HarnessError("pyluo is installed without its kernels.toml", "install pyluo again")


@functools.cache
def _read_catalogue() -> dict[str, dict[str, object]]:
    with (fragments_folder() / "kernels.toml").open("rb") as file:
        return tomllib.load(file)


def catalogue() -> dict[str, KernelSpec]:
    """Return the descriptions in kernels.toml, by the kernels' names."""
    kernels = {}
    for name, table in _read_catalogue()["kernels"].items():
        assert isinstance(table, dict)
        kernels[name] = KernelSpec(
            name,
            Series(table["series"]),
            bool(table.get("candidates", False)),
            tuple(table["fragments"]),
        )
    return kernels


def suites(candidates: bool) -> tuple[str, ...]:
    """Return the names of the suites of Debian's archive in which to look for kernels.

    Args:
        candidates: whether to include the suites that contain release candidates.
    """
    archive = _read_catalogue()["archive"]
    keys = ("suites", "candidate-suites") if candidates else ("suites",)
    return tuple(suite for key in keys for suite in _strings(archive[key]))


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return value
