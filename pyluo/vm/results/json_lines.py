"""Write verdicts as lines of JSON, and read them from a file that has one verdict in each line."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyluo.vm.errors import cause_of
from pyluo.vm.machine.timeline import Event, GuestLog, Jump, Timeline, VmEvent
from pyluo.vm.results.verdict import Outcome, Verdict

if TYPE_CHECKING:
    import os

__all__ = ["guest_from_data", "read", "to_data", "write"]


def to_data(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as values that JSON can represent, with the attributes of `Verdict`."""
    return asdict(verdict, dict_factory=_replace_enums)


def write(verdict: Verdict) -> str:
    """Return a verdict as a line of JSON, with its line break."""
    return json.dumps(to_data(verdict), ensure_ascii=False) + "\n"


def read(path: str | os.PathLike[str]) -> list[Verdict]:
    """Return the verdicts in a file; an incomplete last line is ignored."""
    with open(path, encoding="utf-8") as file:
        return [_verdict_from_data(json.loads(line)) for line in file if line.endswith("\n")]


def guest_from_data(data: dict[str, Any]) -> GuestLog:
    """Return the record of a guest that `dataclasses.asdict` converted to this dictionary."""
    return GuestLog(data["kernel"], tuple(map(_jump_from_data, data["jumps"])), data["console"])


def _replace_enums(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: each.value if isinstance(each, enum.Enum) else each for name, each in fields}


def _verdict_from_data(data: dict[str, Any]) -> Verdict:
    decoded = {
        "outcome": Outcome(data["outcome"]),
        "cause": cause_of(data["cause"]) if data["cause"] else None,
        "guests": tuple(map(guest_from_data, data["guests"])),
        "subtests": tuple(map(_verdict_from_data, data["subtests"])),
    }
    return Verdict(**data | decoded)


def _jump_from_data(data: dict[str, Any]) -> Jump:
    told = data["timeline"]
    events = tuple(Event(**each) for each in told["events"])
    vm_events = tuple(VmEvent(**each) for each in told["vm_events"])
    return Jump(**data | {"timeline": Timeline(told["started"], events, vm_events)})
