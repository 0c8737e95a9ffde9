"""What a guest sees of the host's files."""

from __future__ import annotations

import os


def look(path: str) -> tuple[int, str] | None:
    """Return the size and the content of a file; None if there is none."""
    try:
        return os.stat(path).st_size, open(path).read()
    except FileNotFoundError:
        return None


def names(path: str) -> list[str]:
    """Return the names in a folder."""
    return sorted(os.listdir(path))
