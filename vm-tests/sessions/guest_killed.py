"""Processes that are killed between two steps of a live update.

Imports only pyluo and the standard library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pyluo import (
    IncomingSession,
    LiveUpdate,
    LuoError,
    Memfd,
    OutgoingSession,
    SessionExistsError,
    TokenNotFoundError,
    kexec,
    session_from_fd,
)
from pyluo.guest.faults import Victim

if TYPE_CHECKING:
    from pyluo.guest.faults import ReachStep

BEFORE = ("create", "preserve", "load")
AFTER = ("jump", "retrieve the session", "retrieve the file", "finish")
SHARED = ("nothing", "the session", "the file")
DATA = b"what must not be lost"


@dataclass
class Case:
    """A kill after a step, while another process shares the session or the file.

    Attributes:
        step: the last step before the kill.
        shared: what the other process has open, one of `SHARED`.
        kept: the object that the other process has open.
    """

    step: str
    shared: str
    kept: OutgoingSession | IncomingSession | Memfd | None = None

    @property
    def name(self) -> str:
        return f"{self.step}, {self.shared}"


def cases(steps: tuple[str, ...]) -> list[Case]:
    # Nobody can have a session or a file open before it is retrieved.
    impossible = {
        ("jump", "the session"),
        ("jump", "the file"),
        ("retrieve the session", "the file"),
    }
    return [
        Case(step, shared)
        for step in steps
        for shared in SHARED
        if (step, shared) not in impossible
    ]


def kill_all_before(image: str, cmdline: str) -> tuple[dict[str, str], list[object]]:
    """Kill a process after each step; return the outcomes so far, and what must stay open."""
    known: dict[str, str] = {}
    kept: list[object] = []
    for case in cases(BEFORE):
        _kill_a_victim(case, image, cmdline)
        known[case.name] = _outcome_before_jump(case)
        kept.append(case.kept)
    assert kexec.loaded()  # by a victim that is dead now
    return known, kept


def preserve_for_after() -> list[OutgoingSession]:
    return [session for session, _ in map(_preserve, cases(AFTER))]


def kill_all_after() -> dict[str, str]:
    outcomes = {}
    for case in cases(AFTER):
        if case.step != "jump":
            _kill_a_victim(case, "", "")
        outcomes[case.name] = _outcome_after_jump(case)
    return outcomes


def outcomes_after_the_jump(known: dict[str, str]) -> dict[str, str]:
    """Return the final outcomes: whether the remaining sessions came over with their files."""
    outcomes = {}
    for case in cases(BEFORE):
        outcome = known[case.name]
        if outcome == "session":
            outcome = "carried" if _is_retrievable(case) else "lost"
        outcomes[case.name] = outcome
    return outcomes


def _kill_a_victim(case: Case, image: str, cmdline: str) -> None:
    share = {"nothing": [], "the session": ["session"], "the file": ["file"]}[case.shared]
    steps = partial(_run_victim, case, image, cmdline)
    victim = Victim(steps, stop_at=case.step, share=share)
    victim.kill()
    adopt = Memfd.from_fd if case.shared == "the file" else session_from_fd
    for fd in victim.shared.values():
        case.kept = adopt(fd)


def _run_victim(case: Case, image: str, cmdline: str, reach: ReachStep) -> None:
    """Run the steps of a victim, before the jump or after it."""
    if case.step in BEFORE:
        outgoing, memfd = _create(case)
        reach("create", session=outgoing.fileno(), file=memfd.fileno())
        outgoing.preserve(memfd, 1)
        reach("preserve", session=outgoing.fileno(), file=memfd.fileno())
        kexec.load(image, cmdline=cmdline)
        reach("load", session=outgoing.fileno(), file=memfd.fileno())
    else:
        with LiveUpdate() as device:
            incoming = device.retrieve_session(case.name)
        reach("retrieve the session", session=incoming.fileno())
        file = incoming.retrieve(1).detach()
        reach("retrieve the file", session=incoming.fileno(), file=file)
        session = os.dup(incoming.fileno())
        incoming.finish()
        reach("finish", session=session, file=file)


def _create(case: Case) -> tuple[OutgoingSession, Memfd]:
    memfd = Memfd.create("ram", 4096)
    memfd.write(DATA, 0)
    with LiveUpdate() as device:
        return device.create_session(case.name), memfd


def _preserve(case: Case) -> tuple[OutgoingSession, Memfd]:
    session, memfd = _create(case)
    session.preserve(memfd, 1)
    return session, memfd


def _outcome_before_jump(case: Case) -> str:
    """Return "here" if another process has the file, "session" if the session exists, or "lost"."""
    with LiveUpdate() as device:
        try:
            device.create_session(case.name).discard()
            exists = False
        except SessionExistsError:
            exists = True
    assert exists == (case.shared == "the session")
    if isinstance(case.kept, Memfd):
        assert case.kept.read(len(DATA), 0) == DATA
        case.kept.resize(8192)  # possible because it is in no session any more
        return "here"
    return "session" if exists else "lost"


def _outcome_after_jump(case: Case) -> str:
    if isinstance(case.kept, Memfd):
        with case.kept:
            return "here" if case.kept.read(len(DATA), 0) == DATA else "lost"
    if isinstance(case.kept, IncomingSession):
        return "retrievable" if _is_intact(case.kept) else "lost"
    return "retrievable" if _is_retrievable(case) else "lost"


def _is_retrievable(case: Case) -> bool:
    try:
        with LiveUpdate() as device:
            return _is_intact(device.retrieve_session(case.name))
    except LuoError:
        return False


def _is_intact(session: IncomingSession) -> bool:
    try:
        with session.retrieve(1, Memfd) as memfd:
            return memfd.read(len(DATA), 0) == DATA
    except TokenNotFoundError:
        return False
    finally:
        session.finish()
