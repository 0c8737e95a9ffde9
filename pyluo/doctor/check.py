"""`Check`: one thing that was looked at, what was found, and how to mend it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Check", "Verdict"]


class Verdict(enum.StrEnum):
    """What a check has come to."""

    READY = "ready"
    LIMITED = "limited"
    """Something works less well, or only something that not everybody needs does not work."""
    MISSING = "missing"
    """Nothing works without it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, in a few words.
        verdict: what came of it.
        found: what was found, in words.
        remedy: what to do about it; empty if there is nothing to do.
    """

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""
