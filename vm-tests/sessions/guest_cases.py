"""The guest's part of the tests modelled on the kernel's kexec tests.

Imports only pyluo and the standard library.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from pyluo import LiveUpdate, Memfd, OutgoingSession

if TYPE_CHECKING:
    from collections.abc import Mapping

SESSIONS = 2000
FILES = 500
SEVERAL: dict[str, dict[int, bytes]] = {
    "empty 1": {},
    "empty 2": {},
    "files 1": {1: b"data of the first"},
    "files 2": {2: b"data of the second", 3: b"data of the third"},
}


def allow_files(number: int) -> None:
    """Allow this process so many descriptors besides those that it needs anyway."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 64, max(hard, number + 64)))


def preserve(contents: Mapping[str, Mapping[int, bytes]]) -> list[OutgoingSession]:
    """Create a session for each name, with a file for each token."""
    sessions = []
    with LiveUpdate() as device:
        for name, files in contents.items():
            session = device.create_session(name)
            memfds = {token: _make_memfd(data) for token, data in files.items()}
            session.preserve_many(memfds)
            for memfd in memfds.values():
                memfd.close()
            sessions.append(session)
    return sessions


def retrieve(contents: Mapping[str, Mapping[int, bytes]]) -> dict[str, dict[int, bytes]]:
    """Return the contents of these sessions, by name and token, and finish the sessions."""
    found = {}
    with LiveUpdate() as device:
        for name, files in contents.items():
            session = device.retrieve_session(name)
            found[name] = {
                token: _read_and_close(session.retrieve(token, Memfd)) for token in files
            }
            session.finish()
    return found


def many_sessions() -> dict[str, dict[int, bytes]]:
    return {f"session {number}": {} for number in range(SESSIONS)}


def many_files() -> dict[str, dict[int, bytes]]:
    return {"files": {number: f"data of {number}".encode() for number in range(FILES)}}


def preserve_all() -> list[OutgoingSession]:
    allow_files(SESSIONS + FILES)
    simple = {"simple": {1: b"hello over the jump"}}
    return preserve({**simple, **SEVERAL, **many_sessions(), **many_files()})


def count_retrieved_sessions() -> int:
    return len(retrieve(many_sessions()))


def count_intact_files() -> int:
    allow_files(FILES)
    expected, found = many_files()["files"], retrieve(many_files())["files"]
    return sum(found[token] == data for token, data in expected.items())


def _make_memfd(data: bytes) -> Memfd:
    memfd = Memfd.create("data", len(data))
    memfd.write(data, 0)
    return memfd


def _read_and_close(memfd: Memfd) -> bytes:
    with memfd:
        return memfd.read(memfd.size, 0)
