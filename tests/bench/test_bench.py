"""The bench, without guests: its statistics, what it refuses, what it writes."""

from __future__ import annotations

import json
import math
import re
import subprocess
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as program
from benchmarks import curves, measuring, page
from benchmarks.curves import CURVES
from benchmarks.floors import BUILD
from benchmarks.keys import KEYS, Key
from benchmarks.ratios import Pair, Ratio, fit_exponent
from pyluo import _uapi

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.ratios import Pairs

FLOORS = BUILD.parent.parent / "benchmarks" / "floors"
SVG = "{http://www.w3.org/2000/svg}"
UAPI = _uapi.__file__.rpartition("/")[0]
MACHINE = {
    "accelerator": "tcg",
    "qemu": "QEMU 7",
    "kernel": "7.3",
    "host": "6.1",
    "cpus": 2,
    "cpu": "a CPU",
}
TIMES = {
    "preserve": {1: [0.5], 10: [0.1, 0.2, 0.3], 100: [2.0]},
    "preserve, C": {1: [0.001], 10: [0.01], 100: [0.1]},
}


def make_pairs(*ratios: float) -> list[Pair]:
    return [Pair(2 * ratio, 2.0) for ratio in ratios]


def make_key(*ratios: float) -> Key:
    def pairs(kernel: str, rounds: int) -> Pairs:
        yield from make_pairs(*ratios)

    return Key("ours", "theirs", 1.5, pairs)


def make_result() -> dict[str, Any]:
    measured = {"cycle_ratio": measuring.measure("cycle_ratio", make_key(1, 2, 3, 4, 9), "", 5)}
    drawn = {name: curves.summarize(curve, TIMES) for name, curve in CURVES.items()}
    return measuring.as_json(measured, drawn, MACHINE)


def test_a_ratio_is_the_median_of_its_pairs_and_not_that_of_its_times() -> None:
    pairs = [Pair(1, 1), Pair(20, 10), Pair(3, 1), Pair(40, 10), Pair(5, 1)]
    ratio = Ratio.of(pairs)
    assert ratio == Ratio(median=3, least=1, most=5, runs=5)
    assert ratio.spread == pytest.approx(4 / 3)


@pytest.mark.parametrize("number", range(5))
def test_a_ratio_of_fewer_than_five_pairs_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"a ratio of {number} pairs says nothing"):
        Ratio.of(make_pairs(*[1.0] * number))


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_makes_no_ratio(time: float) -> None:
    with pytest.raises(ValueError, match="no time"):
        Ratio.of([*make_pairs(1, 1, 1, 1), Pair(1.0, time)])


def test_a_bench_that_measured_too_few_pairs_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="a ratio of 4 pairs"):
        measuring.measure("cycle_ratio", make_key(1, 2, 3, 4), "", 5)


def test_the_command_line_refuses_fewer_than_five_pairs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        program.parse(["--rounds", "4"])
    assert end.value.code == 2
    assert "a ratio of 4 pairs says nothing: it takes at least 5" in capsys.readouterr().err


def test_what_builds_kernels_is_measured_only_if_it_is_asked_for() -> None:
    builds = {name for name, key in KEYS.items() if key.builds}
    assert not builds & set(program.chosen(program.parse([])))
    assert builds <= set(program.chosen(program.parse(["--builds"])))


def test_what_builds_kernels_is_refused_without_the_option_for_it() -> None:
    with pytest.raises(SystemExit) as end:
        program.parse(["--only", "build_ratio"])
    assert end.value.code == 2
    arguments = program.parse(["--only", "build_ratio", "--builds"])
    assert program.chosen(arguments) == ["build_ratio"]


def test_only_what_is_named_is_measured_in_the_order_of_the_tables() -> None:
    arguments = program.parse(["--only", "memory", "store_ratio", "cycle_ratio"])
    assert program.chosen(arguments) == ["cycle_ratio", "store_ratio", "memory"]


def test_a_curve_can_have_other_sizes() -> None:
    arguments = program.parse(["--sizes", "memory=4096,1", "--sizes", "sessions=3"])
    assert arguments.sizes == {"memory": (1, 4096), "sessions": (3,)}


@pytest.mark.parametrize("text", ["memory=0,1", "store_ratio=1", "memory", "memory=x"])
def test_sizes_that_no_curve_can_have_are_refused(text: str) -> None:
    with pytest.raises(SystemExit) as end:
        program.parse(["--sizes", text])
    assert end.value.code == 2


def test_a_square_has_the_exponent_two() -> None:
    assert fit_exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)


def test_an_exponent_is_that_of_the_largest_sizes() -> None:
    times = {"jump": {size: [5 + 1e-6 * size**2] for size in (1, 10, 10**6, 10**7, 10**8)}}
    exponents = curves.summarize(CURVES["sessions"], times)["exponents"]
    assert exponents["jump"] == pytest.approx(2, abs=0.01)


def test_what_is_left_without_the_floor_has_an_exponent_of_its_own() -> None:
    sizes = (1000, 2000, 4000)
    floor = {size: [1e-6 * size**2] for size in sizes}
    ours = {size: [1e-6 * size**2 + 1e-3 * size] for size in sizes}
    seen = curves.summarize(CURVES["sessions"], {"preserve": ours, "preserve, C": floor})
    assert seen["exponents"]["preserve, C"] == pytest.approx(2)
    assert seen["exponents"]["preserve without the floor"] == pytest.approx(1)
    assert seen["multiples"] == {"preserve": pytest.approx([2, 1.5, 1.25])}


def test_what_is_no_slower_than_its_floor_has_no_exponent_without_it() -> None:
    times = {"preserve": {1: [1.0], 10: [2.0]}, "preserve, C": {1: [1.0], 10: [3.0]}}
    exponents = curves.summarize(CURVES["sessions"], times)["exponents"]
    assert list(exponents) == ["preserve", "preserve, C"]


def test_a_curve_of_one_size_has_no_exponent() -> None:
    assert curves.summarize(CURVES["sessions"], {"jump": {7: [1.0]}})["exponents"] == {}


def test_bench_json_has_only_what_was_measured_and_four_numbers_of_each_ratio() -> None:
    result = json.loads(json.dumps(make_result(), allow_nan=False))
    assert set(result) == {"cycle_ratio", "curves", "machine"}
    assert result["cycle_ratio"] == {"median": 3.0, "least": 1.0, "most": 9.0, "runs": 5}
    noise = result["machine"]["noise"]["cycle_ratio"]
    assert noise["spread"] == pytest.approx(8 / 3)
    assert noise["cores_of_others"] >= 0
    assert (noise["above_seconds"], noise["below_seconds"]) == (6.0, 2.0)


def test_the_page_draws_a_line_for_everything_that_a_curve_has() -> None:
    text = page.render(make_result())
    assert text.count("<svg") == len(CURVES)
    assert text.count("<polyline") == len(CURVES) * len(TIMES)
    for name in CURVES:
        assert f'id="{name}"' in text


def test_every_point_of_a_drawing_is_a_number_within_it() -> None:
    text = page.render(make_result())
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    for line in re.findall(r'points="([^"]+)"', text):
        points = [tuple(map(float, point.split(","))) for point in line.split()]
        assert len(points) == 3
        for x, y in points:
            assert page.Plot.left <= x <= page.Plot.right
            assert page.Plot.top <= y <= page.Plot.bottom


def test_the_drawing_of_a_curve_is_a_file_of_its_own_with_a_legend() -> None:
    for name, curve in make_result()["curves"].items():
        drawing = ElementTree.fromstring(page.draw(curve))
        assert drawing.tag == f"{SVG}svg"
        assert len(drawing.findall(f"{SVG}polyline")) == len(TIMES), name
        texts = [text.text for text in drawing.iter(f"{SVG}text")]
        assert set(TIMES) <= set(texts)


def test_the_page_asks_for_no_other_file() -> None:
    text = page.render(make_result())
    assert not re.search(r"<script|<link|<img|https?:|url\(", text)


def test_the_page_says_whether_a_goal_was_reached() -> None:
    result = make_result()
    goal = KEYS["cycle_ratio"].goal
    result["cycle_ratio"]["median"] = goal
    assert 'class="number reached"' in page.render(result)
    result["cycle_ratio"]["median"] = goal + 0.01
    assert 'class="number missed"' in page.render(result)


def test_a_page_without_curves_or_ratios_is_a_page() -> None:
    empty = measuring.as_json({}, {}, MACHINE)
    assert "Linux 7.3" in page.render(empty)


@pytest.mark.parametrize("floor", sorted(FLOORS.glob("*.c")), ids=lambda path: path.stem)
def test_a_floor_compiles_without_a_warning(floor: Path) -> None:
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run(
        ["gcc", *options, "-iquote", UAPI, "-iquote", FLOORS, floor], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
