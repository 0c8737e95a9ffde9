"""A matrix as one page of HTML that needs no other file: the table, the timelines, the logs.

The timelines are bars of SVG that the template draws; nothing in the page is a program.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pyluo.vm.machine import timeline
from pyluo.vm.pytest.recorder import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.machine.timeline import Jump
    from pyluo.vm.run.matrix import Cell

__all__ = ["render"]

# What ends with each moment, and the style of its bar. Whatever a guest marked itself comes after.
_PHASES = {
    timeline.LOADED: ("loading the next kernel", "load"),
    timeline.REBOOT_CALLED: ("up to the call of reboot()", "leave"),
    timeline.NEW_KERNEL: ("leaving the old kernel", "jump"),
    timeline.WORKER_UP: ("booting the new kernel", "boot"),
}
_MARKED = "restore"
_ROOM = 13  # characters of each of two names


@dataclass(frozen=True, slots=True)
class _Bar:
    """A phase of a live update, in seconds from its beginning."""

    name: str
    style: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class _Row:
    """A live update as it is drawn."""

    label: str
    bars: list[_Bar]
    landed: bool
    blackout: float | None

    @property
    def end(self) -> float:
        return self.bars[-1].end if self.bars else 0.0


def render(cells: Sequence[Cell]) -> str:
    """The page.

    Args:
        cells: of the matrix, in the order of its routes.
    """
    environment = Environment(
        loader=PackageLoader("pyluo.vm.results.page", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"rows": _rows, "Outcome": Outcome}
    ends = [
        row.end
        for cell in cells
        for record in cell.run.records
        for guest in record.guests
        for row in _rows(guest.jumps)
    ]
    return environment.get_template("page.html.jinja").render(
        cells=cells,
        origins=list(dict.fromkeys((cell.route.origin, cell.route.hops) for cell in cells)),
        targets=list(dict.fromkeys(cell.route.target for cell in cells)),
        kernels=list(
            dict.fromkeys(
                kernel for cell in cells for kernel in (cell.route.origin, cell.route.target)
            )
        ),
        results=Counter(cell.result.value for cell in cells),
        phases=[*_PHASES.values(), ("what the guest marked", _MARKED)],
        longest=max(ends, default=0.0),
    )


def _rows(jumps: Sequence[Jump]) -> list[_Row]:
    return [
        _Row(
            f"{number}: {_short(jump.origin)} to {_short(jump.target)}",
            _bars(jump),
            jump.landed,
            jump.blackout,
        )
        for number, jump in enumerate(jumps, 1)
    ]


def _short(name: str) -> str:
    """A kernel's name where there is little room; of a path, its end tells most."""
    return name if len(name) <= _ROOM else f"…{name[1 - _ROOM :]}"


def _bars(jump: Jump) -> list[_Bar]:
    """One for each moment, from the moment before; of several by one name the first counts."""
    moments = {event.name: jump.timeline.at(event.name) for event in jump.timeline.events}
    bars, start = [], 0.0
    for name, at in moments.items():
        what, style = _PHASES.get(name, (f"up to: {name}", _MARKED))
        bars.append(_Bar(what, style, start, at))
        start = at
    return bars
