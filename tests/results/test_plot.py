"""Tests of the pictures of live updates, from made-up timelines."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from pyluo.vm import HarnessError
from pyluo.vm.machine.timeline import (
    LOADED,
    NEW_KERNEL,
    REBOOT_CALLED,
    WORKER_UP,
    Event,
    Jump,
    Timeline,
    VmEvent,
)
from pyluo.vm.results.plot import draw

if TYPE_CHECKING:
    from pathlib import Path

EVENTS = (
    Event(LOADED, 100.5), Event(REBOOT_CALLED, 101.0), Event(NEW_KERNEL, 101.5),
    Event(WORKER_UP, 103.5), Event("mine", 103.75),
)  # fmt: skip
VMS = (VmEvent("vm0", "paused", 99.0), VmEvent("vm0", "resumed", 105.0))
JUMPS = [
    Jump("previous", "stable", True, Timeline(100.0, EVENTS, VMS)),
    Jump("stable", "previous", False, Timeline(100.0, EVENTS[:2])),
]


def test_a_picture_has_every_live_update_vm_and_phase(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    draw(JUMPS, path)
    text = path.read_text()
    ElementTree.fromstring(text)
    # matplotlib draws letters as paths, and keeps the words in comments.
    words = re.findall(r"<!--\s*(.*?)\s*-->", text)
    for expected in (
        "1: previous to stable, blackout 2.50 s",
        "vm0: 6.00 s",
        "2: stable to previous, did not land",
        "booting the new kernel",
        "what the guest marked",
        "a VM stands still",
    ):
        assert expected in words
    assert words.count("loading the next kernel") == 1  # in the legend


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    draw(JUMPS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for name in ("picture", "picture.html"):
        with pytest.raises(HarnessError, match=r"cannot be written to .*picture.*\.svg"):
            draw(JUMPS, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_no_live_update_is_a_picture_too(tmp_path: Path) -> None:
    draw([], tmp_path / "empty.svg")
    ElementTree.parse(tmp_path / "empty.svg")
