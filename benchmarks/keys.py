"""What the bench measures as a ratio: each key once, in the order in which it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import imports, sessions, stores

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.ratios import Pairs

__all__ = ["KEYS", "Key"]


@dataclass(frozen=True, slots=True)
class Key:
    """A ratio that the bench measures.

    Attributes:
        above: what is divided.
        below: what it is divided by.
        goal: the ratio to reach.
        pairs: measures a number of pairs, in turns, with the guests' kernel of a name.
        builds: whether it builds kernels, which takes hours.
    """

    above: str
    below: str
    goal: float
    pairs: Callable[[str, int], Pairs]
    builds: bool = False


KEYS = {
    "preserve_ratio": Key(
        "preserve_many of 5,000 memfds of 4 KiB", "the same ioctls from C", 1.05,
        sessions.preserve_ratio,
    ),
    "preserve_each_ratio": Key(
        "preserve of 5,000 memfds of 4 KiB, one by one", "the same ioctls from C", 1.3,
        sessions.preserve_each_ratio,
    ),
    "retrieve_ratio": Key(
        "retrieve of 5,000 memfds of 4 KiB, one by one", "the same ioctls from C", 1.3,
        sessions.retrieve_ratio,
    ),
    "store_ratio": Key(
        "a store of 10,000 named entries: add, renew, retrieve",
        "the same files in a bare session from C", 1.5, stores.store_ratio,
    ),
    "import_ratio": Key(
        'python -c "import pyluo" in the guest', "python -c pass", 1.5, imports.import_ratio
    ),
}  # fmt: skip
