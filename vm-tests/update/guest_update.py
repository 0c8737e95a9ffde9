"""The coordinator of updates, in the guest that is the host of the VMs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kvm import guest_vmm

SOCKET = Path("/run/pyluo/update.socket")
LOG = Path("/tmp/coordinator.log")
COMMAND = [sys.executable, "-m", "pyluo", "update"]

_coordinators: list[subprocess.Popen[bytes]] = []


def serve() -> None:
    """Start the coordinator, and wait until it listens."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with LOG.open("ab") as log:
        _coordinators.append(
            subprocess.Popen([*COMMAND, "serve"], stdout=log, stderr=log, env=environment)
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
