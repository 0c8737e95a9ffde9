"""Faults to inject in a guest.

Functions that run in the guest use these functions and classes. The host can also call one with
`vm.hold`, which keeps the result, such as a `MemoryHog`, in the guest until the next jump.
Faults of the next kernel are injected from the host: see `pyluo.vm.machine.faults`.
"""

from __future__ import annotations

from pyluo.guest.faults.allocations import NthFails, each_fails, failslab
from pyluo.guest.faults.cpu import lock_up_cpu
from pyluo.guest.faults.memory import MemoryHog
from pyluo.guest.faults.missing import FaultMissingError
from pyluo.guest.faults.sessions import SessionStorm, StormResult, check_session_storm
from pyluo.guest.faults.victim import ReachStep, StepNotReachedError, Victim

__all__ = [
    "FaultMissingError",
    "MemoryHog",
    "NthFails",
    "ReachStep",
    "SessionStorm",
    "StepNotReachedError",
    "StormResult",
    "Victim",
    "check_session_storm",
    "each_fails",
    "failslab",
    "lock_up_cpu",
]
