"""Faults to inject in a guest: call these from functions that run there, or by `vm.hold`.

Faults of the next kernel are injected by the host: see `pyluo.vm.machine.faults`.
"""

from __future__ import annotations

from pyluo.guest.faults.allocations import NthFails, each_fails, failslab
from pyluo.guest.faults.cpu import lock_up_cpu
from pyluo.guest.faults.memory import MemoryHog
from pyluo.guest.faults.missing import FaultMissingError
from pyluo.guest.faults.sessions import SessionStorm, StormResult, check_session_storm
from pyluo.guest.faults.victim import Reach, StepNotReachedError, Victim

__all__ = [
    "FaultMissingError",
    "MemoryHog",
    "NthFails",
    "Reach",
    "SessionStorm",
    "StepNotReachedError",
    "StormResult",
    "Victim",
    "check_session_storm",
    "each_fails",
    "failslab",
    "lock_up_cpu",
]
