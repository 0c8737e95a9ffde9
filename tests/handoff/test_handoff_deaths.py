"""Either side of a handoff is killed, or interrupted by an exception, at each line of its call.

Afterwards one of them has everything, the contents of the memory included, and knows it. Only what
a sender has not sent yet dies with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

VICTIMS = Path(__file__).parent / "victims.py"


@pytest.mark.parametrize("victim", ["sender", "receiver"])
@pytest.mark.parametrize(
    ("driver", "blow"),
    [
        ("blocking", "kill"),
        ("asyncio", "kill"),
        ("blocking", "resume"),
        ("asyncio", "resume"),
        ("blocking", "abandon"),
    ],
)
def test_one_side_has_everything_and_knows_it(driver: str, blow: str, victim: str) -> None:
    program = [sys.executable, str(VICTIMS), driver, victim, blow]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    *problems, summary = map(json.loads, ended.stdout.splitlines())
    assert problems == []
    assert summary["cases"] > 250
    owners = summary["owners"]
    if blow == "kill" and victim == "sender":
        assert owners["receiver"] > 40, "the receiver took over, or was given the files"
    elif blow == "kill":
        assert owners["sender"] > 40
    elif blow == "abandon":
        assert owners["sender sender"] > 40
        assert owners["receiver receiver"] > 20
    else:
        assert set(owners) == {"receiver receiver"}
