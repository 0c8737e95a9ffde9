"""The page of a matrix, looked at in a browser: on a phone, in the dark, on paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright

from pyluo.vm import Event, Kernel, Timeline
from pyluo.vm.machine.timeline import LOADED, NEW_KERNEL, REBOOT_CALLED, WORKER_UP, GuestLog, Jump
from pyluo.vm.results.cell import Cell, Route
from pyluo.vm.results.page import render
from pyluo.vm.results.pytest_run import PytestRun
from pyluo.vm.results.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

CHROMIUM = "/usr/bin/chromium"
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
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
CONTRAST = 4.5  # WCAG 2.1, 1.4.3: the least for text
# Computes the contrast of each visible text with the first background behind it that is opaque.
LOW_CONTRAST = """
least => {
  const linear = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const opaque = c => c.length === 3 || c[3] === 1;
  const behind = element => {
    for (; element; element = element.parentElement) {
      const found = parse(getComputedStyle(element).backgroundColor);
      if (found.length && opaque(found)) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least) found.push([walker.currentNode.data.trim().slice(0, 40), contrast]);
  }
  return found;
}
"""


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
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def show(browser: Browser, path: Path, **options: Any) -> Page:
    page = browser.new_page(java_script_enabled=True, **options)
    page.goto(path.as_uri())
    return page


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(render(cells(8)))
    return file


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("medium", ["screen", "print"])
def test_nothing_runs_out_of_the_page_and_everything_can_be_read(
    browser: Browser, path: Path, size: dict[str, int], scheme: str, medium: str
) -> None:
    page = show(browser, path, viewport=size)
    page.emulate_media(color_scheme=scheme, media=medium)  # type: ignore[arg-type]
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
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
    assert page.evaluate(LOW_CONTRAST, CONTRAST) == []
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"matrix-{size['width']}-{scheme}-{medium}.png")
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
