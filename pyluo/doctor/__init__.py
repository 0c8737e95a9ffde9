"""Checks of a machine: is its kernel ready for a live update, and can it run the harness?"""

from __future__ import annotations

from pyluo.doctor.check import Check, Verdict
from pyluo.doctor.live_update import check_live_update

__all__ = ["Check", "Verdict", "check_live_update"]
