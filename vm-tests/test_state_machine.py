"""Sessions and files in any order of requests, against a small model of how they should behave.

The model is what the manual says of sessions, files and jumps, in as few lines as that takes. Any
difference is a bug of pyluo's or of the kernel's.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import guest_machine
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pyluo import Seal
from pyluo.vm import VM

if TYPE_CHECKING:
    from guest_machine import Outcome

    from pyluo.vm import Kernel

STEPS = int(os.environ.get("PYLUO_MACHINE_STEPS", "1000"))
RUN = 50  # steps of one run, which begins with nothing
SPACING = 12  # steps between two jumps, at least
NAMES = ["a", "b", "c"]
TOKENS = [0, 1, 2, 2**64 - 1]
SIZES = [0, 1, 4096, 5000, 8192]
SEALS = [0, Seal.SHRINK, Seal.SHRINK | Seal.GROW, Seal.WRITE, Seal.SEAL]


@dataclass
class File:
    """An open file, in the model."""

    kind: str
    data: bytearray
    seals: Seal
    position: int = 0
    preserved: bool = False


@dataclass
class Session:
    """A session, in the model."""

    name: str
    incoming: bool
    files: dict[int, File] = field(default_factory=dict)


class Machine(RuleBasedStateMachine):
    """What the model and the guest are put through."""

    vm: ClassVar[VM]
    steps: ClassVar[int] = 0
    jumps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count(1)
        self.sessions: dict[int, Session] = {}  # by descriptor: one may have several
        self.files: dict[int, File] = {}  # likewise
        self.waiting: dict[str, Session] = {}  # came in, and not retrieved yet
        self.since = 0
        self.vm.call(guest_machine.do, "clear", NAMES)

    def expect(self, expected: Outcome, operation: str, *arguments: Any) -> None:
        Machine.steps += 1
        self.since += 1
        told = self.vm.call(guest_machine.do, operation, *arguments)
        assert told == expected, f"{operation}{arguments}: {told}, where {expected} was expected"

    def pick(self, data: st.DataObject, among: dict[int, Any]) -> int:
        return data.draw(st.sampled_from(sorted(among)))

    @rule(
        kind=st.sampled_from(["memfd", "memfd", "tmpfs", "eventfd"]),
        size=st.sampled_from(SIZES),
        seals=st.sampled_from(SEALS),
    )
    @precondition(lambda self: len(self.files) < 8)
    def make(self, kind: str, size: int, seals: Seal) -> None:
        number = next(self.numbers)
        self.expect(("done", None), "make", number, kind, size, int(seals))
        own = {"memfd": seals, "tmpfs": Seal.SEAL, "eventfd": Seal(0)}[kind]
        self.files[number] = File(kind, bytearray(size), own)

    @rule(data=st.data(), filling=st.binary(min_size=1, max_size=16), offset=st.integers(0, 8200))
    @precondition(lambda self: any(file.kind != "eventfd" for file in self.files.values()))
    def write(self, data: st.DataObject, filling: bytes, offset: int) -> None:
        number, file = self.memory(data)
        end = offset + len(filling)
        grows = end > len(file.data)
        forbidden = file.seals & Seal.WRITE or (
            grows and (file.preserved or file.seals & Seal.GROW)
        )
        if forbidden:
            self.expect(("SealedError", errno.EPERM), "write", number, filling, offset)
            return
        self.expect(("done", None), "write", number, filling, offset)
        file.data.extend(bytes(max(end - len(file.data), 0)))
        file.data[offset:end] = filling

    @rule(data=st.data(), size=st.sampled_from(SIZES))
    @precondition(lambda self: any(file.kind != "eventfd" for file in self.files.values()))
    def resize(self, data: st.DataObject, size: int) -> None:
        number, file = self.memory(data)
        now = len(file.data)
        sealed = (size < now and file.seals & Seal.SHRINK) or (
            size > now and file.seals & Seal.GROW
        )
        if sealed or (file.preserved and size != now):
            self.expect(("SealedError", errno.EPERM), "resize", number, size)
            return
        self.expect(("done", None), "resize", number, size)
        file.data[size:] = bytes(max(size - now, 0))

    @rule(data=st.data(), position=st.sampled_from([0, 7, 2**40]))
    @precondition(lambda self: any(file.kind != "eventfd" for file in self.files.values()))
    def seek(self, data: st.DataObject, position: int) -> None:
        number, file = self.memory(data)
        self.expect(("done", None), "seek", number, position)
        file.position = position

    @rule(data=st.data())
    @precondition(lambda self: self.files)
    def close(self, data: st.DataObject) -> None:
        number = self.pick(data, self.files)
        self.expect(("done", None), "close", number)
        del self.files[number]

    @rule(name=st.sampled_from(NAMES))
    @precondition(lambda self: len(self.sessions) < 6)
    def create(self, name: str) -> None:
        number = next(self.numbers)
        if any(not each.incoming and each.name == name for each in self.sessions.values()):
            self.expect(("SessionExistsError", errno.EEXIST), "create", number, name)
            return
        self.expect(("done", None), "create", number, name)
        self.sessions[number] = Session(name, incoming=False)

    @rule(data=st.data(), token=st.sampled_from(TOKENS))
    @precondition(lambda self: self.sessions and self.files)
    def preserve(self, data: st.DataObject, token: int) -> None:
        number, target = self.pick(data, self.sessions), self.pick(data, self.files)
        session, file = self.sessions[number], self.files[target]
        refusal = self.refusal(session, file, token)
        self.expect(refusal or ("done", None), "preserve", number, target, token)
        if refusal is None:
            session.files[token] = file
            file.preserved = True

    @rule(data=st.data())
    @precondition(lambda self: self.outgoing() and len(self.files) > 1)
    def preserve_many(self, data: st.DataObject) -> None:
        number = self.pick(data, self.outgoing())
        session = self.sessions[number]
        tokens = data.draw(st.lists(st.sampled_from(TOKENS), unique=True, min_size=2))
        wanted = {token: self.pick(data, self.files) for token in tokens}
        done: list[int] = []
        for token, target in wanted.items():
            if self.refusal(session, self.files[target], token):
                break
            done.append(token)
            session.files[token] = self.files[target]
            self.files[target].preserved = True
        told = None if len(done) == len(wanted) else tuple(done)
        self.expect(("done", told), "preserve_many", number, wanted)

    @rule(name=st.sampled_from(NAMES))
    @precondition(lambda self: self.jumps)
    def retrieve_session(self, name: str) -> None:
        number = next(self.numbers)
        if name in self.waiting:
            self.expect(("done", None), "retrieve_session", number, name)
            self.sessions[number] = self.waiting.pop(name)
        elif any(each.incoming and each.name == name for each in self.sessions.values()):
            refusal = ("SessionRetrievedError", errno.EINVAL)
            self.expect(refusal, "retrieve_session", number, name)
        else:
            refusal = ("SessionNotFoundError", errno.ENOENT)
            self.expect(refusal, "retrieve_session", number, name)

    @rule(data=st.data(), token=st.sampled_from(TOKENS))
    @precondition(lambda self: self.sessions)
    def retrieve(self, data: st.DataObject, token: int) -> None:
        number, new = self.pick(data, self.sessions), next(self.numbers)
        session = self.sessions[number]
        if not session.incoming:
            self.expect(("LuoError", errno.EINVAL), "retrieve", number, token, new)
        elif token not in session.files:
            self.expect(("TokenNotFoundError", errno.ENOENT), "retrieve", number, token, new)
        else:
            self.expect(("done", None), "retrieve", number, token, new)
            file = session.files[token]
            file.preserved = False  # resized again, though not yet preserved again
            self.files[new] = file
            self.look_at(new)

    @rule(data=st.data())
    @precondition(lambda self: any(file.kind != "eventfd" for file in self.files.values()))
    def look(self, data: st.DataObject) -> None:
        self.look_at(self.memory(data)[0])

    @rule(data=st.data())
    @precondition(lambda self: self.sessions)
    def finish(self, data: st.DataObject) -> None:
        number = self.pick(data, self.sessions)
        session = self.sessions[number]
        if session.incoming:
            self.expect(("done", None), "finish", number)
            session.files.clear()
        else:
            self.expect(("LuoError", errno.EINVAL), "finish", number)

    @rule(data=st.data())
    @precondition(lambda self: self.sessions)
    def end(self, data: st.DataObject) -> None:
        number = self.pick(data, self.sessions)
        self.expect(("done", None), "end", number)
        session = self.sessions.pop(number)
        if not any(each is session for each in self.sessions.values()):
            for file in session.files.values():
                file.preserved = False
            session.files.clear()

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.sessions) < 6)
    def duplicate(self, data: st.DataObject) -> None:
        number, new = self.pick(data, self.sessions), next(self.numbers)
        self.expect(("done", self.sessions[number].name), "duplicate", number, new)
        self.sessions[new] = self.sessions[number]

    @rule(data=st.data(), kind=st.sampled_from(["outgoing", "incoming"]))
    @precondition(lambda self: self.sessions)
    def adopt(self, data: st.DataObject, kind: str) -> None:
        number = self.pick(data, self.sessions)
        fits = self.sessions[number].incoming == (kind == "incoming")
        refusal = ("WrongSessionError", errno.EINVAL)
        self.expect(("done", None) if fits else refusal, "adopt_as", number, kind)

    @rule()
    @precondition(lambda self: self.since >= SPACING and self.outgoing())
    def live_update(self) -> None:
        Machine.steps += 1
        Machine.jumps += 1
        self.since = 0
        self.vm.live_update()
        self.waiting = {}
        for session in self.sessions.values():
            if not session.incoming:
                self.waiting[session.name] = Session(session.name, True, session.files)
        self.sessions.clear()
        self.files.clear()

    def memory(self, data: st.DataObject) -> tuple[int, File]:
        among = {number: file for number, file in self.files.items() if file.kind != "eventfd"}
        number = self.pick(data, among)
        return number, among[number]

    def outgoing(self) -> dict[int, Session]:
        return {number: each for number, each in self.sessions.items() if not each.incoming}

    def look_at(self, number: int) -> None:
        file = self.files[number]
        seen = (bytes(file.data), int(file.seals), file.position)
        self.expect(("done", seen), "look", number)

    def refusal(self, session: Session, file: File, token: int) -> Outcome | None:
        """What the kernel says to this file under this token, if it is refused."""
        if session.incoming:
            return "LuoError", errno.EINVAL
        if token in session.files:
            return "TokenInUseError", errno.EEXIST
        if file.kind == "eventfd":
            return "NotPreservableError", errno.ENOENT
        if file.preserved or self.held_by_incoming(file):
            return "AlreadyPreservedError", errno.EBUSY
        return None

    def held_by_incoming(self, file: File) -> bool:
        """Retrieved, and its session is not finished yet."""
        return any(
            session.incoming and any(each is file for each in session.files.values())
            for session in self.sessions.values()
        )


def test_any_order_of_requests_and_jumps_does_what_the_manual_says(kernel: Kernel) -> None:
    Machine.steps = Machine.jumps = 0
    with VM(kernel) as vm:
        Machine.vm = vm
        while Machine.steps < STEPS:
            run_state_machine_as_test(Machine, settings=_settings(Machine.steps == 0))
    assert Machine.jumps >= STEPS // 100


def _settings(first: bool) -> settings:
    """The same steps each time for the usual number of them; others each time in a soak."""
    usual = STEPS <= 1000
    return settings(
        max_examples=max(STEPS // RUN, 1),
        stateful_step_count=RUN,
        derandomize=usual and first,
        database=None,
        deadline=None,
        # A step is a request to a guest: to find fewer that fail as well takes many jumps.
        phases=[Phase.generate] if usual else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
