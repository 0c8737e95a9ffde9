"""kernels.toml: which kernels there are, and what each is made of."""

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
    """Which of the archive's kernel series is meant."""

    NEWEST = "newest"
    BEFORE_NEWEST = "before-newest"


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel as kernels.toml describes it.

    Attributes:
        name: what it is called on the command line.
        series: which series of the archive.
        candidates: whether a release candidate counts.
        fragments: names of Kconfig fragments, in the order in which they are merged.
    """

    name: str
    series: Series
    candidates: bool
    fragments: tuple[str, ...]


def fragments_folder() -> Path:
    """Where kernels.toml and the fragments lie: in the checkout, or where pyluo is installed."""
    for folder in (_CHECKOUT / "kernel-config", Path(__file__).parent / "kernel_config"):
        if (folder / "kernels.toml").exists():
            return folder
    raise HarnessError("kernels.toml is not where pyluo is installed", "install pyluo again")


@functools.cache
def _document() -> dict[str, dict[str, object]]:
    with (fragments_folder() / "kernels.toml").open("rb") as file:
        return tomllib.load(file)


def catalogue() -> dict[str, KernelSpec]:
    """The kernels by name."""
    kernels = {}
    for name, table in _document()["kernels"].items():
        assert isinstance(table, dict)
        kernels[name] = KernelSpec(
            name,
            Series(table["series"]),
            bool(table.get("candidates", False)),
            tuple(table["fragments"]),
        )
    return kernels


def suites(candidates: bool) -> tuple[str, ...]:
    """The suites of the archive to look in."""
    archive = _document()["archive"]
    keys = ("suites", "candidate-suites") if candidates else ("suites",)
    return tuple(suite for key in keys for suite in _strings(archive[key]))


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return value
