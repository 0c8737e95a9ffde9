"""How to install what is missing on this system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["how_to_install"]

_APT = Path("/usr/bin/apt")


def how_to_install(packages: Iterable[str]) -> str:
    """Return what to do to get some packages.

    Args:
        packages: the names of the packages in Debian.
    """
    names = " ".join(packages)
    if _APT.exists():
        return f"apt install {names}"
    return f"install what Debian calls {names}; this system's packages may have other names"
