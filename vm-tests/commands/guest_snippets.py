"""Run snippets of the manual in the guest, with what the pages leave to the reader."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from unittest.mock import patch

from pyluo import LiveUpdate, Memfd, OutgoingSession


def run(script: str, **programs: str) -> None:
    """Run a script.

    Args:
        script: its text.
        programs: the texts of Python programs that it finds, by their names.
    """
    folder = Path("/tmp/programs")
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        program = folder / name
        program.write_text(f"#!{sys.executable}\nimport sys\nsys.path[:0] = {sys.path}\n{text}")
        program.chmod(0o755)
    path = os.pathsep.join([os.fspath(folder), os.environ["PATH"]])
    with patch.dict(os.environ, PATH=path):
        exec(script, {})
    gc.collect()  # what the script has dropped is closed


def call(snippet: str, function: str, **names: object) -> None:
    """Call a function of a snippet in this process.

    Args:
        snippet: the snippet.
        function: the name of the function.
        names: what the snippet uses and does not define.
    """
    exec(snippet, names)
    names[function]()  # type: ignore[operator]


def preserve() -> OutgoingSession:
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    with Memfd.create("page", 4096) as page:
        page.write(b"hello", 0)
        session.preserve(page, token=1)
    return session


def intact() -> bool:
    with LiveUpdate() as device:
        session = device.retrieve_session("vm0")
    with session.retrieve(1, Memfd) as page:
        session.finish()
        return page.read(5, 0) == b"hello"


def check_and_preserve_again() -> OutgoingSession:
    assert intact()
    return preserve()


def create() -> OutgoingSession:
    with LiveUpdate() as device:
        return device.create_session("victim")
