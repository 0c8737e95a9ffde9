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
    IncomingStore,
    LiveUpdate,
    Memfd,
    OutgoingSession,
    OutgoingStore,
    RequestError,
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
SHARED = ("nothing", "the session", "the file", "a keeper")
KEEPER = "a keeper"
DATA = b"what must not be lost"


@dataclass
class Case:
    """A kill after a step, while another process shares the session or the file, or keeps a store.

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


def preserve_for_after() -> list[OutgoingSession | OutgoingStore]:
    return [
        _make_store(case) if case.shared == KEEPER else _preserve(case)[0] for case in cases(AFTER)
    ]


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
    share = {"the session": ["session"], "the file": ["file"]}.get(case.shared, [])
    run = _run_kept_victim if case.shared == KEEPER else _run_victim
    steps = partial(run, case, image, cmdline)
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


def _run_kept_victim(case: Case, image: str, cmdline: str, reach: ReachStep) -> None:
    """Run the steps of a victim that has a store, which a holder process keeps."""
    if case.step in BEFORE:
        store = OutgoingStore.create(case.name)
        reach("create")
        with Memfd.create("ram", 4096) as memfd:
            memfd.write(DATA, 0)
            store.add("ram", memfd)
        reach("preserve")
        kexec.load(image, cmdline=cmdline)
        reach("load")
    else:

        class Session(IncomingSession):
            __slots__ = ()

            def finish(self) -> None:
                super().finish()
                reach("finish")

        incoming = IncomingStore.retrieve(case.name)
        reach("retrieve the session")
        incoming.get("ram")
        reach("retrieve the file")
        incoming._session = Session.from_fd(incoming.session.detach(), trusted=True)
        incoming.renew()


def _make_store(case: Case) -> OutgoingStore:
    store = OutgoingStore.create(case.name)
    with Memfd.create("ram", 4096) as memfd:
        memfd.write(DATA, 0)
        store.add("ram", memfd)
    return store


def renewals_completed() -> dict[str, str]:
    """Return the outcome of the renewals that `kill_all_after` completed, after another jump."""
    return {
        case.name: "carried" if _is_store_intact(case) else "lost"
        for case in cases(AFTER)
        if case.shared == KEEPER and case.step == "finish"
    }


def _is_store_intact(case: Case) -> bool:
    store = IncomingStore.retrieve(case.name)
    names = list(store)
    is_intact = False
    if names == ["ram"]:
        with store.get("ram", Memfd) as memfd:
            is_intact = memfd.read(len(DATA), 0) == DATA
    store.finish(destroy=names)
    return is_intact


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
    assert exists == (case.shared in ("the session", KEEPER))
    if isinstance(case.kept, Memfd):
        assert case.kept.read(len(DATA), 0) == DATA
        case.kept.resize(8192)  # possible because it is in no session any more
        return "here"
    return "session" if exists else "lost"


def _outcome_after_jump(case: Case) -> str:
    if case.shared == KEEPER and case.step == "finish":
        OutgoingStore.open(case.name).close()  # completes the renewal
        return "carried"
    if isinstance(case.kept, Memfd):
        with case.kept:
            return "here" if case.kept.read(len(DATA), 0) == DATA else "lost"
    if isinstance(case.kept, IncomingSession):
        return "retrievable" if _is_intact(case.kept) else "lost"
    return "retrievable" if _is_retrievable(case) else "lost"


def _is_retrievable(case: Case) -> bool:
    if case.shared == KEEPER:
        return _is_store_intact(case)
    try:
        with LiveUpdate() as device:
            return _is_intact(device.retrieve_session(case.name))
    except RequestError:
        return False


def _is_intact(session: IncomingSession) -> bool:
    try:
        with session.retrieve(1, Memfd) as memfd:
            return memfd.read(len(DATA), 0) == DATA
    except TokenNotFoundError:
        return False
    finally:
        session.finish()
