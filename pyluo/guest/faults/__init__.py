"""Faults to throw in a guest: call these from functions that run there, or by `vm.hold`.

What goes wrong with the next kernel is thrown by the host: see `pyluo.vm.machine.faults`.
"""

from __future__ import annotations

from pyluo.guest.faults.allocations import NthFails, each_fails, failslab
from pyluo.guest.faults.cpu import lock_up_cpu
from pyluo.guest.faults.memory import MemoryHog
from pyluo.guest.faults.missing import FaultMissingError
from pyluo.guest.faults.sessions import Kept, SessionStorm, after_the_storm
from pyluo.guest.faults.victim import Reach, StepNotReachedError, Victim

__all__ = [
    "FaultMissingError",
    "Kept",
    "MemoryHog",
    "NthFails",
    "Reach",
    "SessionStorm",
    "StepNotReachedError",
    "Victim",
    "after_the_storm",
    "each_fails",
    "failslab",
    "lock_up_cpu",
]
