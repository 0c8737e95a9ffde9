"""Tests of the coordinator with VMMs that are threads; the jumps themselves need a guest."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import pytest

from pyluo import KexecError, RequestError, SessionNotFoundError
from pyluo.cli import main
from pyluo.update import Abort, Jump, Participant, Prepare
from pyluo.update.client import ask
from pyluo.update.coordinator import Coordinator, UpdateAborted
from pyluo.update.host import Host
from pyluo.update.messages import JUMP, VERSION, Done, Progress, Update
from tests.json_output import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

LIMIT = 20.0  # seconds, and much more than anything takes
SOON = 0.3


class Rehearsal(Host):
    """A host that never jumps: its kernel refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"one", "two"}  # the sessions that are open
        self.recorded: list[Any] = []
        self.broken = False
        self.left_out: list[str] = []
        self.jumping = threading.Event()
        self.refuse = threading.Event()
        self.refuse.set()
        self.checking = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def check(self) -> None:
        pass

    def require(self, sessions: Any) -> None:
        self.checking.set()
        assert self.go_on.wait(LIMIT)
        if missing := set(sessions) - self.held:
            raise SessionNotFoundError(errno.ENOENT, "require sessions", str(missing))

    def record(self, record: Any) -> list[str]:
        if self.broken:
            raise KeyError("a mistake in a library")
        self.recorded.append(record)
        return self.left_out

    def forget(self) -> None:
        self.recorded.clear()

    def last(self) -> None:
        return None

    def jump(self) -> float:
        self.jumping.set()
        assert self.refuse.wait(LIMIT)
        raise KexecError(errno.EINVAL, "reboot", "this system")


class Running:
    """A coordinator that serves, in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.host = Rehearsal()
        self.log: list[str] = []
        self.reports: list[tuple[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.coordinator = self.run(self._make())
        self._serving = asyncio.run_coroutine_threadsafe(self.coordinator.serve(path), self._loop)
        self.wait_for(path.exists)

    async def _make(self) -> Coordinator:
        return Coordinator(self.host, self.log.append)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * LIMIT)

    def start_update(self, **options: Any) -> Any:
        """Begin an update; return its future."""
        return asyncio.run_coroutine_threadsafe(self.update(**options), self._loop)

    async def update(self, **options: Any) -> None:
        def report(_: float, name: str, text: str) -> None:
            self.reports.append((name, text))

        await self.coordinator.update(**{"limit": LIMIT, "report": report, **options})

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)

    def cut_connections(self) -> None:
        """End all connections, as the end of the process would."""

        async def cancel() -> None:
            for task in list(self.coordinator._tasks):
                task.cancel()

        self.run(cancel())

    def end(self) -> None:
        self._serving.cancel()
        with pytest.raises(CancelledError):
            self._serving.result(LIMIT)
        self.run(asyncio.sleep(SOON))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    one = Running(tmp_path / "socket")
    yield one
    one.end()


@contextmanager
def joined(running: Running, *names: str) -> Iterator[list[Participant]]:
    participants = [Participant.join(name, path=running.path) for name in names]
    try:
        yield participants
    finally:
        for participant in participants:
            participant.close()


def prepare(participant: Participant) -> Prepare:
    wanted = participant.receive(LIMIT)
    assert isinstance(wanted, Prepare)
    return wanted


def run_on(participant: Participant) -> str:
    """Run on as the coordinator says; return its reason."""
    wanted = participant.receive(LIMIT)
    assert isinstance(wanted, Abort)
    participant.running(wanted)
    return wanted.reason


def test_in_a_dry_run_all_get_ready_and_run_on(running: Running) -> None:
    with joined(running, "one", "two") as participants:
        assert running.coordinator.participants == ("one", "two")
        update = running.start_update(dry_run=True)
        for participant, name in zip(participants, ("one", "two"), strict=True):
            wanted = prepare(participant)
            assert (wanted.round, wanted.limit, wanted.dry_run) == (1, LIMIT, True)
            participant.ready(wanted, [name])
        assert [run_on(each) for each in participants] == ["a dry run"] * 2
        update.result(LIMIT)
    assert sorted(running.reports) == sorted(
        (name, text) for name in ("one", "two") for text in ("ready", "runs on")
    )
    assert not running.host.jumping.is_set()


def test_who_does_not_answer_in_time_aborts_it_for_all(running: Running) -> None:
    with joined(running, "one", "two") as (one, two):
        update = running.start_update(limit=SOON)
        one.ready(prepare(one), ["one"])
        reason = "two: not ready within 0.3 s"
        assert run_on(one) == reason
        prepare(two)
        assert run_on(two) == reason
        with pytest.raises(UpdateAborted, match=reason):
            update.result(LIMIT)


def test_who_is_unable_aborts_it_for_all_with_the_reason(running: Running) -> None:
    with joined(running, "one", "two") as (one, two):
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        two.unable(prepare(two), "no room")
        assert [run_on(each) for each in (one, two)] == ["two: no room"] * 2
        with pytest.raises(UpdateAborted, match="two: no room"):
            update.result(LIMIT)
        # What was said in this round does not count in the next one.
        again = running.start_update(dry_run=True)
        for each, name in ((one, "one"), (two, "two")):
            each.ready(prepare(each), [name])
        assert [run_on(each) for each in (one, two)] == ["a dry run"] * 2
        again.result(LIMIT)


def test_who_dies_before_it_is_ready_aborts_it_for_all(running: Running) -> None:
    with joined(running, "one", "two") as (one, two):
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        prepare(two)
        two.close()
        assert run_on(one) == "two: it left before it was ready"
        with pytest.raises(UpdateAborted):
            update.result(LIMIT)
    running.wait_for(lambda: not running.coordinator.participants)


@pytest.mark.parametrize("is_held", [True, False])
def test_a_vm_whose_vmm_dies_after_it_was_ready_jumps_if_its_session_is_held(
    running: Running, is_held: bool
) -> None:
    if not is_held:
        running.host.held.discard("two")
    with joined(running, "one", "two") as (one, two):
        update = running.start_update()
        two.ready(prepare(two), ["two"])
        two.close()
        running.wait_for(lambda: "two has left" in running.log)
        one.ready(prepare(one), ["one"])
        if is_held:
            assert isinstance(one.receive(LIMIT), Jump)
        run_on(one)
        with pytest.raises(UpdateAborted, match="reboot" if is_held else "two"):
            update.result(LIMIT)
    assert running.host.jumping.is_set() == is_held


def test_a_kernel_that_refuses_lets_all_run_on(running: Running) -> None:
    with joined(running, "one", "two") as participants:
        update = running.start_update()
        for participant, name in zip(participants, ("one", "two"), strict=True):
            participant.ready(prepare(participant), [name])
        for participant in participants:
            assert isinstance(participant.receive(LIMIT), Jump)
            assert "reboot" in run_on(participant)
        with pytest.raises(UpdateAborted, match="reboot"):
            update.result(LIMIT)
    assert running.host.recorded == []


def test_a_mistake_of_the_coordinator_lets_all_run_on(running: Running) -> None:
    running.host.broken = True
    with joined(running, "one") as [one]:
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        assert "a mistake in a library" in run_on(one)
        with pytest.raises(UpdateAborted, match="a mistake in a library"):
            update.result(LIMIT)
    assert not running.host.jumping.is_set()


def test_what_is_not_carried_over_is_told_before_the_jump(running: Running) -> None:
    running.host.left_out = ["the route to 10.0.0.0/8"]
    with joined(running, "one") as [one]:
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        assert isinstance(one.receive(LIMIT), Jump)
        run_on(one)
        with pytest.raises(UpdateAborted):
            update.result(LIMIT)
    told = [text for name, text in running.reports if not name]
    assert told == ["not carried over: the route to 10.0.0.0/8", JUMP]


def test_who_comes_meanwhile_has_to_be_ready_too(running: Running) -> None:
    with joined(running, "one") as (one,):
        update = running.start_update(dry_run=True)
        wanted = prepare(one)
        with joined(running, "two") as (two,):
            late = prepare(two)
            assert late.round == wanted.round
            assert late.limit <= wanted.limit
            one.ready(wanted, ["one"])
            assert not update.done()
            two.ready(late, ["two"])
            assert [run_on(each) for each in (one, two)] == ["a dry run"] * 2
            update.result(LIMIT)


def test_who_comes_while_the_sessions_are_checked_has_to_be_ready_too(running: Running) -> None:
    running.host.go_on.clear()
    with joined(running, "one") as (one,):
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        assert running.host.checking.wait(LIMIT)
        with joined(running, "two") as (two,):
            wanted = prepare(two)
            running.host.go_on.set()
            running.run(asyncio.sleep(SOON))
            assert not running.host.jumping.is_set()
            two.ready(wanted, ["two"])
            for each in (one, two):
                assert isinstance(each.receive(LIMIT), Jump)
                run_on(each)
            with pytest.raises(UpdateAborted, match="reboot"):
                update.result(LIMIT)


def test_who_comes_while_the_host_jumps_is_told_so(running: Running) -> None:
    running.host.refuse.clear()
    with joined(running, "one") as (one,):
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        assert running.host.jumping.wait(LIMIT)
        with pytest.raises(RequestError) as caught:
            Participant.join("two", path=running.path)
        assert caught.value.errno == errno.ECONNRESET
        assert any("The host jumps now" in line for line in running.log)
        running.host.refuse.set()
        assert isinstance(one.receive(LIMIT), Jump)
        run_on(one)
        with pytest.raises(UpdateAborted):
            update.result(LIMIT)


def test_a_coordinator_that_is_told_to_end_lets_all_run_on(running: Running) -> None:
    with joined(running, "one", "two") as (one, two):
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        update.cancel()
        assert run_on(one) == "the coordinator was told to end"
        prepare(two)
        run_on(two)


def test_a_coordinator_that_ends_while_the_host_jumps_lets_nobody_run_on(running: Running) -> None:
    running.host.refuse.clear()
    with joined(running, "one") as (one,):
        update = running.start_update()
        one.ready(prepare(one), ["one"])
        assert running.host.jumping.wait(LIMIT)
        update.cancel()
        running.run(asyncio.sleep(SOON))
        assert isinstance(one.receive(LIMIT), Jump)
        with pytest.raises(TimeoutError):
            one.receive(SOON)
        running.host.refuse.set()


def test_a_vm_that_is_still_stored_runs_on_when_its_vmm_joins_again(running: Running) -> None:
    with Participant.join("one", path=running.path, stored=True) as one:
        assert run_on(one) == "no update is under way"


def test_no_two_participants_have_the_same_name(running: Running) -> None:
    with joined(running, "one"), pytest.raises(RequestError) as caught:
        Participant.join("one", path=running.path)
    assert caught.value.errno == errno.ECONNRESET
    assert any("Another participant is called 'one'" in line for line in running.log)
    running.wait_for(lambda: not running.coordinator.participants)
    with joined(running, "one"):  # it has left
        pass


def test_without_those_that_are_expected_nobody_is_told_anything(running: Running) -> None:
    with joined(running, "one") as (one,):
        with pytest.raises(UpdateAborted, match="two, three: not there"):
            running.run(running.update(expected=["one", "two", "three"]))
        with pytest.raises(TimeoutError):
            one.receive(SOON)


def test_one_update_at_a_time(running: Running) -> None:
    with joined(running, "one") as (one,):
        update = running.start_update(dry_run=True)
        wanted = prepare(one)
        with pytest.raises(RequestError) as caught:
            running.run(running.update(dry_run=True))
        assert caught.value.errno == errno.EBUSY
        one.ready(wanted, ["one"])
        run_on(one)
        update.result(LIMIT)


def test_a_participant_gets_sessions_of_its_own_name_only(running: Running) -> None:
    with joined(running, "one") as (one,):
        for name in ("two", "one2", "on", ""):
            with pytest.raises(RequestError, match="It is not called 'one'") as caught:
                one.create_session(name)
            assert caught.value.errno == errno.EACCES
            with pytest.raises(RequestError):
                one.retrieve_session(name)


@pytest.mark.skipif(os.path.exists("/dev/liveupdate"), reason="a kernel with live update")
def test_what_the_device_refuses_a_participant_is_told(running: Running) -> None:
    with joined(running, "one") as (one,), pytest.raises(RequestError) as caught:
        one.create_session("one.more")
    assert caught.value.errno == errno.ENOENT


def test_what_is_no_message_ends_only_its_own_connection(running: Running) -> None:
    with joined(running, "one") as (one,):
        with joined(running, "two") as (two,):
            two._connection.send(b"nonsense")
            assert two.receive(LIMIT) is None
        update = running.start_update(dry_run=True)
        one.ready(prepare(one), ["one"])
        run_on(one)
        update.result(LIMIT)


def test_what_was_said_too_late_does_not_count(running: Running) -> None:
    with joined(running, "one", "two") as (one, two):
        update = running.start_update(limit=SOON)
        late = prepare(one)
        two.unable(prepare(two), "no room")
        update.cancel()  # nobody waits for the answers
        for each in (one, two):
            run_on(each)
        again = running.start_update(dry_run=True)
        wanted = prepare(one)
        one.unable(late, "too late")
        two.ready(prepare(two), ["two"])
        one.ready(wanted, ["one"])
        for each in (one, two):
            run_on(each)
        again.result(LIMIT)


def test_a_vm_that_is_in_no_session_is_not_ready(running: Running) -> None:
    with joined(running, "one") as (one,):
        update = running.start_update()
        one.ready(prepare(one), [])
        assert run_on(one) == "one: it names no session that has its VM"
        with pytest.raises(UpdateAborted):
            update.result(LIMIT)


@pytest.mark.parametrize("name", ["", "x" * 64, "ü" * 32])
def test_the_name_of_a_vm_is_one_for_a_session(running: Running, name: str) -> None:
    with pytest.raises(RequestError) as caught:
        Participant.join(name, path=running.path)
    assert caught.value.errno == errno.ECONNRESET
    assert any("1 to 63 bytes" in line for line in running.log)


def test_a_hundred_dry_runs_leak_nothing(running: Running) -> None:
    def take_part(participant: Participant, name: str) -> None:
        while (wanted := participant.receive(LIMIT)) is not None:
            if isinstance(wanted, Prepare):
                participant.ready(wanted, [name])
            elif isinstance(wanted, Abort):
                participant.running(wanted)

    with joined(running, "one", "two") as participants:
        threads = [
            threading.Thread(target=take_part, args=pair)
            for pair in zip(participants, ("one", "two"), strict=True)
        ]
        for thread in threads:
            thread.start()
        running.run(running.update(dry_run=True))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            running.run(running.update(dry_run=True))
        assert len(os.listdir("/proc/self/fd")) == before
        for participant in participants:
            participant._connection.shutdown(2)
        for thread in threads:
            thread.join(LIMIT)
    assert len(running.reports) == 101 * 4


def test_the_command_shows_who_takes_part_and_what_happens(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    with joined(running, "one") as (one,):
        assert main(["update", "status", "--socket", str(running.path)]) == 0
        assert capsys.readouterr().out == "one: takes part\n"
        assert main(["update", "status", "--socket", str(running.path), "--json"]) == 0
        assert read_json_lines("update status", capsys.readouterr().out) == [
            {"seconds": 0.0, "name": "one", "text": "takes part"},
            {"failure": ""},
        ]

        def take_part() -> None:
            for _ in range(2):
                one.ready(prepare(one), ["one"])
                run_on(one)

        thread = threading.Thread(target=take_part)
        thread.start()
        words = ["--dry-run", "--rounds", "2", "--limit", "20", "--json"]
        assert main(["update", "run", "--socket", str(running.path), *words]) == 0
        thread.join(LIMIT)
    *said, end = read_json_lines("update run", capsys.readouterr().out)
    told = [(each["name"], each["text"]) for each in said]
    assert told.count(("one", "ready")) == 2
    assert told.count(("one", "runs on")) == 2
    assert end == {"failure": ""}


def test_a_coordinator_that_ends_while_the_host_jumps_is_no_failure(running: Running) -> None:
    running.host.refuse.clear()
    request = Update(version=VERSION, limit=LIMIT, dry_run=False, rounds=1, expected=["one"])
    with joined(running, "one") as (one,):
        answers = ask(running.path, request)
        thread = threading.Thread(target=lambda: one.ready(prepare(one), ["one"]))
        thread.start()
        assert [answer.text for answer in answers_until(answers, JUMP)] == ["ready", JUMP]
        thread.join(LIMIT)
        running.cut_connections()
        assert list(answers) == []
        running.host.refuse.set()


def answers_until(answers: Iterator[Progress | Done], text: str) -> Iterator[Progress]:
    for answer in answers:
        assert isinstance(answer, Progress)
        yield answer
        if answer.text == text:
            return


def test_a_coordinator_that_ends_before_is_a_failure(running: Running) -> None:
    request = Update(version=VERSION, limit=LIMIT, dry_run=False, rounds=1, expected=["one"])
    with joined(running, "one") as (one,):
        answers = ask(running.path, request)
        thread = threading.Thread(target=lambda: one.ready(prepare(one), ["one"]))
        running.host.go_on.clear()
        thread.start()
        assert next(answers) == Progress(seconds=ANY, name="one", text="ready")
        running.cut_connections()
        with pytest.raises(RequestError) as caught:
            next(answers)
        assert caught.value.errno == errno.ECONNRESET
        running.host.go_on.set()
        thread.join(LIMIT)


def test_the_command_says_why_there_was_no_update(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["update", "run", "--socket", str(running.path), "--expect", "one"]
    assert main(words) == 1
    assert capsys.readouterr().err == "pyluo: no update: one: not there\n"


def test_the_command_says_that_nobody_coordinates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["update", "status", "--socket", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--rounds", "2"], ["--dry-run", "--rounds", "0"], ["--limit=0"]]
)
def test_wrong_numbers_are_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["update", "run", *words])
    assert ended.value.code == 2
