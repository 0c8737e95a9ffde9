"""A kernel's command line, read as the kernel reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["is_switched_on"]


def is_switched_on(name: str, words: Sequence[str], *, default: bool) -> bool:
    """What a is_switched_on is set to: the last one counts.

    Args:
        name: of the is_switched_on, such as ``liveupdate``.
        words: of the command line; those behind ``--`` are for the first process.
        default: what counts when it is not there.

    Source: lib/kstrtox.c, kstrtobool(): one letter decides, or two.
    """
    if "--" in words:
        words = words[: words.index("--")]
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return values[-1].lower().startswith(("1", "e", "on", "t", "y")) if values else default
