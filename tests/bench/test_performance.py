"""The page of the manual about performance is made of what the bench measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.snippets import ROOT

if TYPE_CHECKING:
    from pathlib import Path

MEASURED = json.loads((ROOT / "docs" / "measured.json").read_text())
CPUS = MEASURED["machine"]["cpus"]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the manual, which a test may write to."""
    return shutil.copytree(ROOT / "docs", tmp_path / "docs")


def make(docs: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(docs / "make_performance.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def take_over(docs: Path, cpus: int) -> dict[str, Any]:
    """Take over a run that measured one ratio and one curve; return what is kept then."""
    machine = {**MEASURED["machine"], "cpus": cpus}
    machine["noise"] = {"preserve_ratio": MEASURED["machine"]["noise"]["preserve_ratio"]}
    ratio = {"median": 123.0, "least": 122.0, "most": 124.0, "runs": 7}
    curves = {"memory": MEASURED["curves"]["memory"] | {"title": "another run"}}
    new = docs.parent / "bench.json"
    new.write_text(json.dumps({"preserve_ratio": ratio, "curves": curves, "machine": machine}))
    done = make(docs, new)
    assert done.returncode == 0, done.stderr
    kept: dict[str, Any] = json.loads((docs / "measured.json").read_text())
    assert kept["preserve_ratio"] == ratio
    assert kept["curves"]["memory"]["title"] == "another run"
    page = (docs / "explanation" / "performance.md").read_text()
    assert "| **123.00** | 122.00 to 124.00 |" in page
    assert "### Another run, by MiB" in page
    assert make(docs, "--check").returncode == 0
    return kept


def test_what_a_run_did_not_measure_stays_if_the_machine_is_the_same(docs: Path) -> None:
    kept = take_over(docs, CPUS)
    assert kept["cycle_ratio"] == MEASURED["cycle_ratio"]
    assert kept["curves"]["moves"] == MEASURED["curves"]["moves"]
    assert kept["machine"] == MEASURED["machine"]


def test_what_another_machine_measured_replaces_everything(docs: Path) -> None:
    kept = take_over(docs, CPUS + 1)
    assert set(kept) == {"preserve_ratio", "curves", "machine"}
    assert [file.name for file in (docs / "static" / "curves").iterdir()] == ["memory.svg"]


@pytest.mark.parametrize("file", ["explanation/performance.md", "static/curves/memory.svg"])
def test_a_page_or_a_drawing_that_was_edited_is_told(docs: Path, file: str) -> None:
    with (docs / file).open("a") as page:
        page.write("more")
    done = make(docs, "--check")
    assert done.returncode == 1
    assert f"{docs / file} is out of date" in done.stderr
