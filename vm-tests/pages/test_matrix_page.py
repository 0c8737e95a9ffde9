"""The page of a matrix, looked at in a browser: on a phone, in the dark, on paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pages.looking import PHONE, each_way, look, show
from pyluo.vm import Event, Kernel, Timeline
from pyluo.vm.machine.timeline import LOADED, NEW_KERNEL, REBOOT_CALLED, WORKER_UP, GuestLog, Jump
from pyluo.vm.results.cell import Cell, Route
from pyluo.vm.results.page import render
from pyluo.vm.results.pytest_run import PytestRun
from pyluo.vm.results.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Browser

KERNELS = [
    Kernel(name, release, Path(name))
    for name, release in (("stable", "7.3.4"), ("/home/somebody/src/linux-next-of-today", "7.4.0"))
]
LANDED = (
    Event(LOADED, 0.1), Event(REBOOT_CALLED, 0.12), Event(NEW_KERNEL, 0.3), Event(WORKER_UP, 2.1),
    Event("descriptor retrieved", 2.2),
)  # fmt: skip
CONSOLE = "\n".join(f"[    {number}.000000] a line of the console" for number in range(400))
NAME = "tests/test_seals_and_sizes.py::test_seals_of_files_that_are_preserved_survive[write-grow]"


def cells(routes: int) -> list[Cell]:
    """Return cells with each kind of outcome, and with jumps of which one did not land."""
    made = []
    for number in range(routes):
        origin, target = KERNELS[number % 2], KERNELS[number // 2 % 2]
        jumps = (
            Jump(origin.name, target.name, True, Timeline(0.0, LANDED)),
            Jump(target.name, origin.name, bool(number % 5), Timeline(0.0, LANDED[:3])),
        )
        guest = GuestLog(origin.name, jumps, CONSOLE)
        outcome = list(Outcome)[number % len(Outcome)]
        verdict = Verdict(NAME, outcome, "the reason, in a line", CONSOLE, guests=(guest,))
        made.append(Cell(Route(origin, target, 1 + number // 4), PytestRun((verdict,), 0, CONSOLE)))
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(render(cells(8)))
    return file


@each_way
def test_nothing_runs_out_of_the_page_and_everything_can_be_read(
    browser: Browser, path: Path, size: dict[str, int], scheme: str, medium: str
) -> None:
    page = look(browser, path, "matrix", size, scheme, medium)
    for name in page.locator("h3").all():
        box = name.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= size["width"]
    bars = [bar.bounding_box() for bar in page.locator(".bar i").all()]
    assert len(bars) == 8 * (5 + 3)
    for box in bars:
        assert box is not None
        assert box["height"] >= 12
        assert box["width"] >= 2
        assert 0 <= box["x"] < box["x"] + box["width"] <= size["width"]
    page.close()


def test_the_consoles_open_without_a_mouse(browser: Browser, path: Path) -> None:
    page = show(browser, path, viewport=PHONE)
    console = page.locator("details").first
    console.locator("summary").focus()
    page.keyboard.press("Enter")
    assert console.locator("pre").is_visible()
    page.close()


def test_only_what_is_seen_of_a_page_of_500_routes_is_drawn(
    browser: Browser, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    file = tmp_path / "large.html"
    file.write_text(render(cells(500)))
    page = show(browser, file, viewport=PHONE)
    assert page.evaluate("document.readyState") == "complete"
    seconds = page.evaluate("performance.getEntriesByType('navigation')[0].duration / 1000")
    record_property("seconds", seconds)
    print(f"{file.stat().st_size >> 20} MiB opened in {seconds:.2f} s")
    assert page.locator("section").count() == 500
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    drawn = page.evaluate(
        """[...document.querySelectorAll("section h3")].filter(
            each => each.checkVisibility({contentVisibilityAuto: true})).length"""
    )
    assert drawn < 50
    page.locator("section").last.scroll_into_view_if_needed()
    assert page.locator("section").last.locator("h3").is_visible()
    page.close()
