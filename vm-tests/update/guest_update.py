"""The coordinator of updates, in the guest that is the host of the VMs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm import guest_vmm

if TYPE_CHECKING:
    from collections.abc import Sequence

SOCKET = Path("/run/pyluo-update.socket")
LOG = Path("/tmp/coordinator.log")
COMMAND = [sys.executable, "-m", "pyluo", "update"]

_coordinators: list[subprocess.Popen[bytes]] = []


def serve(*options: str) -> None:
    """Start the coordinator, and wait until it listens."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with LOG.open("ab") as log:
        _coordinators.append(
            subprocess.Popen([*COMMAND, "serve", *options], stdout=log, stderr=log, env=environment)
        )
    deadline = time.monotonic() + guest_vmm.PATIENCE
    while not SOCKET.exists():
        assert _coordinators[-1].poll() is None, LOG.read_text()
        assert time.monotonic() < deadline, LOG.read_text()
        time.sleep(0.05)


def end_coordinator(number: int) -> int:
    """Send a signal to the coordinator, and return its status."""
    coordinator = _coordinators.pop()
    coordinator.send_signal(number)
    status = coordinator.wait(guest_vmm.PATIENCE)
    SOCKET.unlink(missing_ok=True)
    return status


def wait_for_log(text: str, count: int = 1) -> None:
    """Wait until the coordinator has logged `text` so often."""
    deadline = time.monotonic() + guest_vmm.PATIENCE
    while LOG.read_text().count(text) < count:
        assert time.monotonic() < deadline, LOG.read_text()
        time.sleep(0.05)


def ask(*words: str) -> tuple[int, list[dict[str, Any]]]:
    """Run `pyluo update`; return its status and what it says."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*COMMAND, *words, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=guest_vmm.PATIENCE,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def open_files() -> int:
    """Return how many descriptors the coordinator has open."""
    return len(os.listdir(f"/proc/{_coordinators[-1].pid}/fd"))


def wait_until_all_take_part(names: Sequence[str]) -> None:
    """Wait until the service has these participants."""
    deadline = time.monotonic() + guest_vmm.PATIENCE
    while time.monotonic() < deadline:
        if SOCKET.exists():
            _, said = ask("status")
            if {each["name"] for each in said[:-1] if "takes part" in each["text"]} == set(names):
                return
        time.sleep(0.5)
    units = ["journalctl", "--no-pager", "-n", "80"]
    log = subprocess.run(units, capture_output=True, text=True, check=False).stdout
    raise AssertionError(f"not all take part:\n{log}")


def wait_for_output(path: str, lines: int) -> str:
    """Wait until a file has so many lines more; return all of it."""
    deadline = time.monotonic() + guest_vmm.PATIENCE
    file = Path(path)
    lines += file.read_text().count("\n")
    while file.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.1)
    return file.read_text()
