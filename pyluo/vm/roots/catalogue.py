"""Read roots.toml, which says what each root that has a name is made from."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass

from pyluo.vm.kernels.catalogue import fragments_folder

__all__ = ["RootSpec", "catalogue"]


@dataclass(frozen=True, slots=True)
class RootSpec:
    """The description of a root in roots.toml.

    Attributes:
        name: the root's name on the command line.
        suites: the suites of Debian that it is made from.
        packages: the packages in it, beside the essential ones and those that they depend on.
    """

    name: str
    suites: tuple[str, ...]
    packages: tuple[str, ...]


@functools.cache
def catalogue() -> dict[str, RootSpec]:
    """Return the descriptions in roots.toml, by the roots' names."""
    with (fragments_folder() / "roots.toml").open("rb") as file:
        roots = tomllib.load(file)["roots"]
    return {
        name: RootSpec(name, tuple(table["suites"]), tuple(table["packages"]))
        for name, table in roots.items()
    }
