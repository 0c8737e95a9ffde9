"""The page of the bench, looked at in a browser, with what was measured for the manual."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.page import render
from pages.looking import each_way, look
from tests.snippets import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser

MEASURED = json.loads((ROOT / "docs" / "measured.json").read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "bench.html"
    file.write_text(render(MEASURED))
    return file


@each_way
def test_every_curve_is_drawn_within_the_page_and_its_numbers_can_be_read(
    browser: Browser, path: Path, size: dict[str, int], scheme: str, medium: str
) -> None:
    page = look(browser, path, "bench", size, scheme, medium)
    assert page.locator("svg").count() == len(MEASURED["curves"]) > 0
    for drawing in page.locator("svg").all():
        box = drawing.bounding_box()
        assert box is not None
        assert box["width"] >= 300
        assert box["height"] >= 150
        assert box["x"] + box["width"] <= size["width"]
    for line in page.locator("polyline").all():
        box = line.bounding_box()
        assert box is not None
        assert box["width"] >= 100  # a curve over sizes is no dot
        assert line.evaluate("each => getComputedStyle(each).stroke") != "none"
    heights = [text.bounding_box() for text in page.locator("svg text").all()]
    assert min(box["height"] for box in heights if box) >= 10  # CSS pixels
    page.close()
