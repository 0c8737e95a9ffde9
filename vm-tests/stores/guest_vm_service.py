"""A service that keeps the RAM of a VM over live updates, in the descriptor store of systemd.

As a program, this is the service; its functions are for the worker. It kills itself by SIGKILL once
in each life after each of the steps in KILL_AFTER, and systemd starts it again. The VM has RAM_MIB
of memory.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from pyluo import (
    IncomingSession,
    IncomingStore,
    Memfd,
    OutgoingStore,
    ServiceManager,
    SessionNotFoundError,
)
from pyluo.open_sessions import open_sessions

NAME = "vm0"
SIZE = int(os.environ.get("RAM_MIB", 0)) << 20
CHUNK = 1 << 20
STATE = Path("/run/vm.json")
KILLED = Path("/run/vm.killed")
PATIENCE = 120  # seconds


def wait_until_ready(after: int = 0) -> dict[str, Any]:
    """Return the state of the service, once it is ready and not the process of this PID."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if STATE.exists():
            state: dict[str, Any] = json.loads(STATE.read_text())
            if state["pid"] != after:
                return state
        time.sleep(0.1)
    log = subprocess.run(
        ["journalctl", "--no-pager", "-n", "60", "-u", "vm.service"], capture_output=True, text=True
    )
    raise AssertionError(f"the service is not ready:\n{log.stdout}")


class Session(IncomingSession):
    """A session whose finish is a step of its own."""

    __slots__ = ()

    def finish(self) -> None:
        super().finish()
        step("finished")


def step(name: str) -> None:
    """End a step: die, if that is wanted after this step and has not happened in this life."""
    killed = KILLED.read_text().split() if KILLED.exists() else []
    if name in os.environ["KILL_AFTER"].split() and name not in killed:
        KILLED.write_text(" ".join([*killed, name]))
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    assert ServiceManager.of_this_process() is not None
    found = ""
    try:
        incoming = IncomingStore.retrieve(NAME)
    except SessionNotFoundError:
        try:
            store = OutgoingStore.open(NAME)
            found = "opened"
        except SessionNotFoundError:
            store = OutgoingStore.create(NAME)
            found = "created"
            step("created")
        if "ram" not in store:
            with Memfd.create("ram", SIZE) as ram:
                store.add("ram", ram, meta={"crc": fill(ram)})
            step("added")
    else:
        found = "retrieved"
        step("retrieved")
        with incoming.get("ram", Memfd) as ram:
            [entry] = incoming.entries
            assert ram.size == SIZE
            assert checksum(ram) == entry.meta["crc"], "the RAM has changed"
            step("got")
        incoming._session = Session.from_fd(incoming.session.detach(), trusted=True)
        store = incoming.renew()
    step("ready")
    killed = KILLED.read_text().split() if KILLED.exists() else []
    state = {"pid": os.getpid(), "found": found, "killed": killed, "entries": list(store)}
    STATE.write_text(json.dumps(state))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(os.environ["NOTIFY_SOCKET"])
        systemd.send(b"READY=1")
    signal.pause()


def fill(ram: Memfd) -> int:
    crc = 0
    source = random.Random(1)
    chunk = source.randbytes(CHUNK)
    for offset in range(0, SIZE, CHUNK):
        data = offset.to_bytes(8, "little") + chunk[8:]
        ram.write(data, offset)
        crc = zlib.crc32(data, crc)
    return crc


def checksum(ram: Memfd) -> int:
    crc = 0
    for offset in range(0, SIZE, CHUNK):
        crc = zlib.crc32(ram.read(CHUNK, offset), crc)
    return crc


def create_with_a_holder() -> None:
    """Create a store, as a service for which systemd stores no descriptors."""
    OutgoingStore.create("held")


def groups_of_holders() -> list[tuple[str | None, str]]:
    """Return the session and the control group of each holder process."""
    return [
        (each.session, Path(f"/proc/{each.pid}/cgroup").read_text().strip())
        for each in open_sessions()
        if each.command == "pyluo-holder"
    ]


def discard_held() -> None:
    OutgoingStore.open("held").discard()


if __name__ == "__main__":
    create_with_a_holder() if "hold" in sys.argv else main()
