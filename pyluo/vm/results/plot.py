"""Draw live updates in time, as a picture: SVG, PNG or whatever else matplotlib writes.

The page of a matrix draws the same in HTML (`pyluo.vm.results.page`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError
from pyluo.vm.results.phases import MARKED, STYLES, VM, phases

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pyluo.vm.machine.timeline import Jump

__all__ = ["check_format", "draw"]

_COLOURS = {
    "load": "#6e7781", "leave": "#afb8c1", "jump": "#bf8700", "boot": "#0969da",
    MARKED: "#1a7f37", VM: "#8250df",
}  # fmt: skip
_ROW = 0.45  # inches
_WIDTH = 10.0


def draw(jumps: Sequence[Jump], path: str | os.PathLike[str]) -> None:
    """Draw a row for each live update, and below it one for each VM that it carried over.

    Args:
        jumps: the live updates.
        path: the file to write; its suffix says the format.

    Raises:
        HarnessError: matplotlib does not write this format.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    check_format(path)
    rows = [row for number, jump in enumerate(jumps, 1) for row in _rows(number, jump)]
    figure = Figure(figsize=(_WIDTH, 1.2 + _ROW * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (label, bars) in enumerate(rows):
        for style, name, start, end in bars:
            axes.barh(place, end - start, left=start, height=0.6, color=_COLOURS[style], label=name)
        axes.text(max(end for *_, end in bars), place, f" {label}", va="center", fontsize=9)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("seconds since the live update was asked for")
    axes.spines[["left", "right", "top"]].set_visible(False)
    _add_legend(axes)
    figure.savefig(path)


def check_format(path: str | os.PathLike[str]) -> None:
    """Refuse a file that no picture can be written to, before there is one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        HarnessError: it does not write this format.
    """
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".") not in known:
        raise HarnessError(
            f"a picture cannot be written to {path}", f"end its name in .{', .'.join(known)}"
        )


def _add_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(
        once.values(), once.keys(), ncols=3, frameon=False, fontsize=8,
        loc="lower center", bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip


def _rows(number: int, jump: Jump) -> list[tuple[str, list[tuple[str, str, float, float]]]]:
    """Return the label and the bars of a live update, and those of its VMs.

    A bar has a style, a name, a start and an end, in seconds since the update began.
    """
    end = "did not land" if not jump.landed else ""
    if jump.blackout is not None:
        end = f"blackout {jump.blackout:.2f} s"
    bars = [(each.style, STYLES[each.style], each.start, each.end) for each in phases(jump)]
    rows = [(f"{number}: {jump.origin} to {jump.target}, {end}", bars)] if bars else []
    for gap in jump.timeline.gaps:
        words = "did not go on" if gap.length is None else f"{gap.length:.2f} s"
        times = gap.events[0].at, gap.end or gap.events[-1].at
        first, last = (time - jump.timeline.started for time in times)
        rows.append((f"{gap.vm}: {words}", [(VM, STYLES[VM], first, last)]))
    return rows
