"""Look at a page in a browser: on a phone and a desk, light and dark, on a screen and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["DESK", "PHONE", "each_way", "look", "show"]

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
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


def each_way(test: Any) -> Any:
    """Run a test with the arguments of `look` for each way to look at a page."""
    for names, values, ids in (
        ("size", [PHONE, DESK], ["phone", "desk"]),
        ("scheme", ["light", "dark"], None),
        ("medium", ["screen", "print"], None),
    ):
        test = pytest.mark.parametrize(names, values, ids=ids)(test)
    return test


def show(browser: Browser, path: Path, **options: Any) -> Page:
    page = browser.new_page(java_script_enabled=True, **options)
    page.goto(path.as_uri())
    return page


def look(
    browser: Browser, path: Path, name: str, size: dict[str, int], scheme: str, medium: str
) -> Page:
    """Show a page; check that it is no wider than the screen, and that its text can be read.

    Args:
        browser: the browser.
        path: the file of the page.
        name: its name, for the screenshot.
        size: the screen, in CSS pixels.
        scheme: "light" or "dark".
        medium: "screen" or "print".
    """
    page = show(browser, path, viewport=size)
    page.emulate_media(color_scheme=scheme, media=medium)  # type: ignore[arg-type]
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate(LOW_CONTRAST, CONTRAST) == []
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-{size['width']}-{scheme}-{medium}.png")
    return page
