"""Render what the bench measured as a page of HTML, with its curves as pictures.

The page needs no other files and contains no scripts. It is readable on a phone, in the dark and
without a picture: the numbers of each curve are also in a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from benchmarks.curves import describe
from benchmarks.keys import KEYS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Template

__all__ = ["Plot", "draw", "render"]

_COLOURS = {
    "light": "--c0: #0969da; --c1: #bf5b00; --c2: #1a7f37; --c3: #8250df; --c4: #a40e26; "
    "--c5: #6e7781; --c6: #0a7a83;",
    "dark": "--c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #a371f7; --c4: #ff8182; "
    "--c5: #9aa4af; --c6: #39c5cf;",
}

_WIDTH, _HEIGHT = 640, 320  # of a drawing; its place on the page may be narrower
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 12, 14, 44
_LEGEND = 18  # the height of a line of the legend


@dataclass(frozen=True, slots=True)
class _Axis:
    """A logarithmic axis.

    Attributes:
        low: the exponent of ten at its start.
        high: that at its end.
        start: the place of its start in the drawing.
        end: that of its end.
    """

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low = math.floor(math.log10(min(values)))
        high = math.ceil(math.log10(max(values)))
        return cls(low, max(high, low + 1), start, end)

    def place(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The places of the powers of ten, and their names."""
        powers = range(self.low, self.high + 1)
        return [(self.place(10.0**power), f"{10.0**power:g}") for power in powers]


class Plot:
    """The drawing of a curve, log-log.

    Args:
        curve: a curve as bench.json has it.

    Attributes:
        x: the axis of the sizes.
        y: the axis of the seconds.
        lines: for each thing that was measured, its name and the points of its line.
        legend: the places of the lines of a legend, below the drawing.
        whole: the height of the drawing with a legend.
    """

    width, height = _WIDTH, _HEIGHT
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    def __init__(self, curve: Mapping[str, Any]) -> None:
        self.legend = range(
            _HEIGHT + _LEGEND, _HEIGHT + _LEGEND * (len(curve["seconds"]) + 1), _LEGEND
        )
        self.whole = _HEIGHT + _LEGEND * (len(curve["seconds"]) + 1)
        seconds: dict[str, list[float]] = curve["seconds"]
        times = [time for line in seconds.values() for time in line]
        self.x = _Axis.over(curve["sizes"], self.left, self.right)
        self.y = _Axis.over(times, self.bottom, self.top)
        self.lines: dict[str, list[tuple[float, float]]] = {
            what: [
                (self.x.place(size), self.y.place(time))
                for size, time in zip(curve["sizes"], line, strict=True)
            ]
            for what, line in seconds.items()
        }


def render(result: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        result: what bench.json contains.
    """
    curves = result["curves"]
    return _template("page.html.jinja").render(
        keys=KEYS,
        ratios={name: result[name] for name in KEYS if name in result},
        machine=result["machine"],
        curves=[(name, curve, Plot(curve)) for name, curve in curves.items()],
    )


def draw(curve: Mapping[str, Any]) -> str:
    """Return the drawing of a curve as an SVG file, with a legend.

    Args:
        curve: a curve as bench.json has it.
    """
    return _template("curve.svg.jinja").render(curve=curve, plot=Plot(curve), alone=True)


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"colours": _COLOURS, "describe": describe}
    return environment.get_template(name)
