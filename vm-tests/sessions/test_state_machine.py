"""Compare random requests on sessions and files with a small model of how they should behave.

The model implements what the manual says of sessions, files and jumps. Any difference is a bug of
pyluo's or of the kernel's. The known bugs of the kernels are left out here, and have tests of their
own: above all, seals that are added after preserving.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import random_requests
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pyluo import Seal
from pyluo.vm import VM, GuestCrash
from sessions import guest_machine

if TYPE_CHECKING:
    from pyluo.vm import Kernel
    from sessions.guest_machine import Outcome

USUAL = 1000
STEPS = int(os.environ.get("PYLUO_MACHINE_STEPS", USUAL))
RUN = 50  # steps of one run, which begins without files and sessions
SPACING = 12  # the least number of steps between two jumps
NAMES = ["a", "b", "c"]
TOKENS = [0, 1, 2, 2**64 - 1]
SIZES = [0, 1, 4096, 5000, 8192]
SEALS = [0, Seal.SHRINK, Seal.SHRINK | Seal.GROW, Seal.WRITE, Seal.SEAL]
# How often each answer of the model must occur at least: a request that the machine never makes is
# not tested.
ANSWERS = {
    ("create", "done"): 10,
    ("create", "SessionExistsError"): 1,
    ("preserve", "done"): 15,
    ("preserve", "TokenInUseError"): 1,
    ("preserve", "AlreadyPreservedError"): 1,
    ("preserve", "NotPreservableError"): 1,
    ("preserve", "LuoError"): 1,
    ("preserve_many", "whole"): 1,
    ("preserve_many", "partly"): 1,
    ("retrieve_session", "done"): 10,
    ("retrieve_session", "SessionRetrievedError"): 1,
    ("retrieve_session", "SessionNotFoundError"): 1,
    ("retrieve", "done"): 15,
    ("retrieve", "TokenNotFoundError"): 1,
    ("retrieve", "LuoError"): 1,
    ("finish", "done"): 1,
    ("finish", "LuoError"): 1,
    ("finish_and_stay", "done"): 1,
    ("end", "done"): 1,
    ("adopt_as", "done"): 1,
    ("adopt_as", "LuoError"): 1,
    ("duplicate", "done"): 1,
    ("resize", "SealedError"): 1,
    ("write", "SealedError"): 1,
    ("live_update", "done"): 10,
}


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
    """Random requests, each made to the guest and to the model."""

    vm: ClassVar[VM]
    answers: ClassVar[Counter[tuple[str, str]]] = Counter()
    history: ClassVar[list[str]] = []
    crash: ClassVar[GuestCrash | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count(1)
        self.sessions: dict[int, Session] = {}  # by descriptor, of which a session may have several
        self.files: dict[int, File] = {}  # likewise by descriptor
        self.not_retrieved: dict[str, Session] = {}  # incoming ones that are not retrieved yet
        self.steps_since_jump = 0
        Machine.history.clear()
        self.request("clear", NAMES)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Make a random request; the weights favour requests that need many others before them."""
        names = [name for name, weight in self.weights().items() for _ in range(weight)]
        getattr(self, data.draw(st.sampled_from(names)))(data)

    def weights(self) -> dict[str, int]:
        memory = any(file.kind != "eventfd" for file in self.files.values())
        outgoing, incoming = self.outgoing(), self.incoming_with_files()
        holding = any(session.files for session in outgoing.values())
        return {
            "make": 4 if len(self.files) < 8 else 0,
            "write": 2 * memory,
            "resize": 2 * memory,
            "seek": 1 * memory,
            "look": 1 * memory,
            "close": 1 if self.files else 0,
            "create": 3 if len(self.sessions) < 6 else 0,
            "preserve": 6 if outgoing and self.files else 1 * bool(self.sessions and self.files),
            "preserve_many": 2 if outgoing and len(self.files) > 1 else 0,
            "retrieve_session": 12 if self.not_retrieved else 1 * bool(self.count("live_update")),
            "retrieve": 12 if incoming else 1 * bool(self.sessions),
            "finish": 1 if self.sessions else 0,
            "finish_and_stay": 1 if incoming else 0,
            "end": 1 if self.sessions else 0,
            "duplicate": 1 if 0 < len(self.sessions) < 6 else 0,
            "adopt": 1 if self.sessions else 0,
            "live_update": 6 if holding and self.steps_since_jump >= SPACING else 0,
        }

    def make(self, data: st.DataObject) -> None:
        number = next(self.numbers)
        kind = data.draw(st.sampled_from(["memfd", "memfd", "memfd", "tmpfs", "eventfd"]))
        size, seals = data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from(SEALS))
        self.expect(("done", None), "make", number, kind, size, int(seals))
        own = {"memfd": Seal(seals), "tmpfs": Seal.SEAL, "eventfd": Seal(0)}[kind]
        self.files[number] = File(kind, bytearray(size), own)

    def write(self, data: st.DataObject) -> None:
        number, file = self.draw_memory_file(data)
        filling = data.draw(st.binary(min_size=1, max_size=16))
        last = max(len(file.data) - len(filling), 0)
        offset = data.draw(st.integers(0, last) | st.integers(0, 8200))
        end = offset + len(filling)
        fixed = file.preserved or file.seals & Seal.GROW
        if file.seals & Seal.WRITE or (end > len(file.data) and fixed):
            self.expect(("SealedError", errno.EPERM), "write", number, filling, offset)
            return
        self.expect(("done", None), "write", number, filling, offset)
        file.data.extend(bytes(max(end - len(file.data), 0)))
        file.data[offset:end] = filling

    def resize(self, data: st.DataObject) -> None:
        number, file = self.draw_memory_file(data)
        size, now = data.draw(st.sampled_from(SIZES)), len(file.data)
        sealed = file.seals & (Seal.SHRINK if size < now else Seal.GROW)
        if size != now and (sealed or file.preserved):
            self.expect(("SealedError", errno.EPERM), "resize", number, size)
            return
        self.expect(("done", None), "resize", number, size)
        file.data[size:] = bytes(max(size - now, 0))

    def seek(self, data: st.DataObject) -> None:
        number, file = self.draw_memory_file(data)
        file.position = data.draw(st.sampled_from([0, 7, 2**40]))
        self.expect(("done", None), "seek", number, file.position)

    def look(self, data: st.DataObject) -> None:
        self.check_file(self.draw_memory_file(data)[0])

    def close(self, data: st.DataObject) -> None:
        number = self.draw_number(data, self.files)
        self.expect(("done", None), "close", number)
        del self.files[number]

    def create(self, data: st.DataObject) -> None:
        number, name = next(self.numbers), data.draw(st.sampled_from(NAMES))
        if any(session.name == name for session in self.outgoing().values()):
            self.expect(("SessionExistsError", errno.EEXIST), "create", number, name)
            return
        self.expect(("done", None), "create", number, name)
        self.sessions[number] = Session(name, incoming=False)

    def preserve(self, data: st.DataObject) -> None:
        number, target = self.draw_number(data, self.sessions), self.draw_number(data, self.files)
        session, file = self.sessions[number], self.files[target]
        token = data.draw(st.sampled_from(TOKENS))
        refusal = self.predict_refusal(session, file, token)
        self.expect(refusal or ("done", None), "preserve", number, target, token)
        if refusal is None:
            session.files[token] = file
            file.preserved = True

    def preserve_many(self, data: st.DataObject) -> None:
        number = self.draw_number(data, self.outgoing())
        session = self.sessions[number]
        tokens = data.draw(st.lists(st.sampled_from(TOKENS), unique=True, min_size=2))
        targets = data.draw(st.permutations(sorted(self.files)))
        wanted = dict(zip(tokens, targets, strict=False))
        done: list[int] = []
        refusal: Outcome | None = None
        for token, target in wanted.items():
            if refusal := self.predict_refusal(session, self.files[target], token):
                break
            done.append(token)
            session.files[token] = self.files[target]
            self.files[target].preserved = True
        how = "partly" if refusal else "whole"
        answer = (tuple(done), *(refusal or ("", 0)))
        self.expect(("done", answer), "preserve_many", number, wanted, counted=how)

    def retrieve_session(self, data: st.DataObject) -> None:
        number = next(self.numbers)
        name = data.draw(st.sampled_from(sorted(self.not_retrieved) * 3 + NAMES))
        if name in self.not_retrieved:
            self.expect(("done", None), "retrieve_session", number, name)
            self.sessions[number] = self.not_retrieved.pop(name)
            return
        there = any(each.incoming and each.name == name for each in self.sessions.values())
        known, unknown = ("SessionRetrievedError", errno.EINVAL), ("SessionNotFoundError", 2)
        self.expect(known if there else unknown, "retrieve_session", number, name)

    def retrieve(self, data: st.DataObject) -> None:
        with_files, new = self.incoming_with_files(), next(self.numbers)
        number = data.draw(st.sampled_from(sorted(with_files) * 5 + sorted(self.sessions)))
        session = self.sessions[number]
        token = data.draw(st.sampled_from(sorted(session.files) * 3 + TOKENS))
        if not session.incoming:
            self.expect(("LuoError", errno.EINVAL), "retrieve", number, token, new)
        elif token not in session.files:
            self.expect(("TokenNotFoundError", errno.ENOENT), "retrieve", number, token, new)
        else:
            self.expect(("done", None), "retrieve", number, token, new)
            file = self.files[new] = session.files[token]
            file.preserved = False  # it can be resized, but not yet preserved again
            self.check_file(new)

    def finish(self, data: st.DataObject) -> None:
        number = self.draw_number(data, self.sessions)
        if not self.sessions[number].incoming:
            self.expect(("LuoError", errno.EINVAL), "finish", number)
            return
        self.expect(("done", None), "finish", number)
        self.sessions.pop(number).files.clear()

    def finish_and_stay(self, data: st.DataObject) -> None:
        number = self.draw_number(data, self.incoming_with_files())
        self.expect(("done", None), "finish_and_stay", number)
        self.sessions[number].files.clear()

    def end(self, data: st.DataObject) -> None:
        number = self.draw_number(data, self.sessions)
        self.expect(("done", None), "end", number)
        session = self.sessions.pop(number)
        if not any(each is session for each in self.sessions.values()):
            for file in session.files.values():
                file.preserved = False
            session.files.clear()

    def duplicate(self, data: st.DataObject) -> None:
        number, new = self.draw_number(data, self.sessions), next(self.numbers)
        self.expect(("done", self.sessions[number].name), "duplicate", number, new)
        self.sessions[new] = self.sessions[number]

    def adopt(self, data: st.DataObject) -> None:
        number = self.draw_number(data, self.sessions)
        kind = data.draw(st.sampled_from(["outgoing", "incoming"]))
        fits = self.sessions[number].incoming == (kind == "incoming")
        refusal = ("LuoError", errno.EINVAL)
        self.expect(("done", None) if fits else refusal, "adopt_as", number, kind)

    def live_update(self, data: st.DataObject) -> None:
        del data
        self.steps_since_jump = 0
        Machine.answers["live_update", "done"] += 1
        Machine.history.append("live_update")
        try:
            self.vm.live_update()
        except GuestCrash as crash:
            Machine.crash = crash
            raise
        self.not_retrieved = {
            session.name: Session(session.name, True, session.files)
            for session in self.outgoing().values()
        }
        self.sessions.clear()
        self.files.clear()

    def expect(self, expected: Outcome, operation: str, *arguments: Any, counted: str = "") -> None:
        Machine.answers[operation, counted or expected[0]] += 1
        self.steps_since_jump += 1
        answer = self.request(operation, *arguments)
        assert answer == expected, f"{operation}{arguments}: {answer} instead of {expected}"

    def request(self, operation: str, *arguments: Any) -> Outcome:
        Machine.history.append(f"{operation}{arguments}")
        try:
            return self.vm.call(guest_machine.do, operation, *arguments)
        except GuestCrash as crash:
            Machine.crash = crash
            raise

    @staticmethod
    def count(operation: str) -> int:
        return Machine.answers[operation, "done"]

    @staticmethod
    def draw_number(data: st.DataObject, among: dict[int, Any]) -> int:
        return data.draw(st.sampled_from(sorted(among)))

    def draw_memory_file(self, data: st.DataObject) -> tuple[int, File]:
        among = {number: file for number, file in self.files.items() if file.kind != "eventfd"}
        number = self.draw_number(data, among)
        return number, among[number]

    def outgoing(self) -> dict[int, Session]:
        return {number: each for number, each in self.sessions.items() if not each.incoming}

    def incoming_with_files(self) -> dict[int, Session]:
        """Return the incoming sessions that have files."""
        return {
            number: each for number, each in self.sessions.items() if each.incoming and each.files
        }

    def check_file(self, number: int) -> None:
        file = self.files[number]
        state = (bytes(file.data), int(file.seals), file.position)
        self.expect(("done", state), "look", number)

    def predict_refusal(self, session: Session, file: File, token: int) -> Outcome | None:
        """Return the refusal to preserve this file under this token; None if it is preserved."""
        if session.incoming:
            return "LuoError", errno.EINVAL
        if token in session.files:
            return "TokenInUseError", errno.EEXIST
        if file.kind == "eventfd":
            return "NotPreservableError", errno.ENOENT
        unfinished = any(
            each is file
            for other in self.incoming_with_files().values()
            for each in other.files.values()
        )
        if file.preserved or unfinished:
            return "AlreadyPreservedError", errno.EBUSY
        return None


def test_any_order_of_requests_and_jumps_does_what_the_manual_says(kernel: Kernel) -> None:
    Machine.answers = Counter()
    Machine.crash = None
    with VM(kernel) as vm:
        Machine.vm = vm
        try:
            random_requests.run(
                Machine, Machine.answers, ANSWERS, steps=STEPS, usual=USUAL, length=RUN
            )
        except BaseException:
            if Machine.crash is None:
                raise
            # Hypothesis repeats the run on the dead guest, and reports only its other answers.
            Machine.crash.add_note("The run: " + "; ".join(Machine.history))
            raise Machine.crash from None
    assert random_requests.find_rare(Machine.answers, ANSWERS) == []
