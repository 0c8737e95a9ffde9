"""Boolean parameters of a kernel's command line, parsed as the kernel parses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["is_switched_on"]


def is_switched_on(name: str, words: Sequence[str], *, default: bool) -> bool:
    """Return whether a boolean parameter is on; its last occurrence decides.

    Args:
        name: the name of the parameter, such as ``liveupdate``.
        words: the words of the command line; words after ``--`` are for init and are ignored.
        default: the result if the parameter is not on the command line.

    Source: lib/kstrtox.c, kstrtobool(), which looks only at the first one or two letters
    """
    if "--" in words:
        words = words[: words.index("--")]
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return values[-1].lower().startswith(("1", "e", "on", "t", "y")) if values else default
