"""What the equivalents of the kernel's kexec tests run in the guest; only pyluo and the stdlib."""

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
    """Lets this process have so many descriptors, and those that it needs itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 64, max(hard, number + 64)))


def preserve(contents: Mapping[str, Mapping[int, bytes]]) -> list[OutgoingSession]:
    """A session for each name, with a file for each token."""
    sessions = []
    with LiveUpdate() as device:
        for name, files in contents.items():
            session = device.create_session(name)
            memfds = {token: _file(data) for token, data in files.items()}
            session.preserve_many(memfds)
            for memfd in memfds.values():
                memfd.close()
            sessions.append(session)
    return sessions


def retrieve(contents: Mapping[str, Mapping[int, bytes]]) -> dict[str, dict[int, bytes]]:
    """What is in the sessions of these names, under these tokens; then they are finished."""
    found = {}
    with LiveUpdate() as device:
        for name, files in contents.items():
            with device.retrieve_session(name) as session:
                found[name] = {token: _contents(session.retrieve(token, Memfd)) for token in files}
    return found


def many_sessions() -> dict[str, dict[int, bytes]]:
    return {f"session {number}": {} for number in range(SESSIONS)}


def many_files() -> dict[str, dict[int, bytes]]:
    return {"files": {number: f"data of {number}".encode() for number in range(FILES)}}


def preserve_all() -> list[OutgoingSession]:
    allow_files(SESSIONS + FILES)
    simple = {"simple": {1: b"hello over the jump"}}
    return preserve({**simple, **SEVERAL, **many_sessions(), **many_files()})


def sessions_that_came() -> int:
    return len(retrieve(many_sessions()))


def files_that_came_whole() -> int:
    allow_files(FILES)
    expected, found = many_files()["files"], retrieve(many_files())["files"]
    return sum(found[token] == data for token, data in expected.items())


def _file(data: bytes) -> Memfd:
    memfd = Memfd.create("data", len(data))
    memfd.write(data, 0)
    return memfd


def _contents(memfd: Memfd) -> bytes:
    with memfd:
        return memfd.read(memfd.size, 0)
