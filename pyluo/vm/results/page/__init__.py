"""Render a matrix as a page of HTML with its table, timelines and consoles.

The page needs no other files and contains no scripts. It is readable on a phone, in the dark and on
paper, and without a mouse: what a bar stands for is also in words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pyluo.vm.results.phases import STYLES, VM, Phase, phases
from pyluo.vm.results.verdict import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.machine.timeline import Jump
    from pyluo.vm.results.cell import Cell

__all__ = ["render"]

_NAME_LIMIT = 13  # characters of each of the two names in a label


@dataclass(frozen=True, slots=True)
class _VmRow:
    """The row of a VM below that of a live update: its bar, and what is said of it."""

    bar: Phase
    label: str
    words: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a drawing: the bars of one live update, and the VMs that it carried over.

    Attributes:
        before: seconds that a VM was paused before the update began.
    """

    label: str
    bars: list[Phase]
    landed: bool
    blackout: float | None
    before: float
    vms: list[_VmRow]

    @property
    def length(self) -> float:
        ends = [bar.end for bar in (*self.bars[-1:], *(vm.bar for vm in self.vms))]
        return self.before + max(ends, default=0.0)


def render(cells: Sequence[Cell]) -> str:
    """Return the page as HTML.

    Args:
        cells: the cells of the matrix, in the order of its routes.
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
        row.length
        for cell in cells
        for verdict in cell.run.verdicts
        for guest in verdict.guests
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
        outcomes=Counter(cell.outcome.value for cell in cells),
        phases=[(name, style) for style, name in STYLES.items()],
        # Of a page without bars, nothing is drawn in proportion to it.
        longest=max(ends, default=0.0) or 1.0,
    )


def _rows(jumps: Sequence[Jump]) -> list[_Row]:
    return [
        _Row(
            f"{number}: {_shorten(jump.origin)} to {_shorten(jump.target)}",
            phases(jump),
            jump.landed,
            jump.blackout,
            max([0.0, *(-vm.bar.start for vm in vms)]),
            vms,
        )
        for number, jump in enumerate(jumps, 1)
        for vms in [_vm_rows(jump)]
    ]


def _vm_rows(jump: Jump) -> list[_VmRow]:
    started = jump.timeline.started
    rows = []
    for gap in jump.timeline.gaps:
        start, end = gap.events[0].at, gap.end
        label = (
            f"{gap.vm}: did not go on" if gap.length is None else f"{gap.vm}: {gap.length:.2f} s"
        )
        if gap.clock is not None:
            label += f"; its own clock: {gap.clock:.3f} s"
        if gap.counted is not None:
            label += f"; its counter: {gap.counted:+d}"
        words = " · ".join(f"{event.name} {event.at - started:+.2f} s" for event in gap.events)
        bar = Phase(gap.vm, VM, start - started, (end or gap.events[-1].at) - started)
        rows.append(_VmRow(bar, label, "; ".join(gap.regressions) or words))
    return rows


def _shorten(name: str) -> str:
    """Return a name, but only the end of a long one, because the end of a path says most."""
    return name if len(name) <= _NAME_LIMIT else f"…{name[1 - _NAME_LIMIT :]}"
