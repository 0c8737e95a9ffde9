"""Functions that run in a guest with another root than the host's."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

from pyluo import LiveUpdate, Memfd

SESSION = "vm0"


def first_process() -> str:
    return Path("/proc/1/comm").read_text().strip()


def describe() -> tuple[str, str]:
    """Return the name of the operating system, and Python's version."""
    return platform.freedesktop_os_release()["ID"], platform.python_version()


def write_and_read(text: str) -> list[str]:
    """Write a file wherever programs expect to write one, and read them all."""
    texts = []
    for folder in ("/run", "/tmp", "/var/tmp", "/var/lib"):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            file = Path(name, "file")
            file.write_text(text)
            texts.append(file.read_text())
    return texts


def preserve(content: bytes) -> object:
    ram = Memfd.create("ram", 4096)
    ram.write(content, 0)
    with LiveUpdate() as device:
        session = device.create_session(SESSION)
    session.preserve(ram, token=1)
    return session, ram


def retrieve(size: int) -> bytes:
    with LiveUpdate() as device:
        session = device.retrieve_session(SESSION)
    with session.retrieve(1, Memfd) as ram:
        session.finish()
        return ram.read(size, 0)
