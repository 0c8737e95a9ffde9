"""Hands over between two processes again and again, and hits one of them at each line of its call.

The program is run by test_handoff_deaths.py, apart from pytest, so that forking is cheap. It prints
a line for each case, and one for each thing that is wrong.

    victims.py DRIVER VICTIM BLOW

DRIVER is blocking or asyncio, VICTIM is sender or receiver. BLOW is kill (SIGKILL), resume (an
exception, after which the same call is made again) or abandon (an exception, after which the
victim abandons the handoff).
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import mmap
import os
import signal
import socket
import sys
import warnings
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import pyluo
from pyluo import HandoffError, Memfd
from pyluo._sys import PacketBuffer
from pyluo.handoff import Handoff, Owner, Receiving, Sending

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    Point = tuple[str, int, int]  # the file, the line, and which time it comes there

PACKAGE = os.path.dirname(pyluo.__file__)
RAM = bytes(range(256)) * 256
STATE = b"the state of the virtual machine"
PacketBuffer.MAX_FDS = 3
COUNT = 4  # so that there are two packets of descriptors
TIMEOUT = 20.0  # seconds; nothing waits for so long unless something is wrong

driver = blow = ""
is_built = False  # whether this process has its object
struck_early = False  # whether the blow came before that
# What the one who is killed knows just before that: whether the receiver has all files.
at_death = mmap.mmap(-1, 1)
has_all: Callable[[], bool] = lambda: False  # noqa: E731


class Interrupted(BaseException):
    """What a signal handler raises."""


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# The two processes


def run_sender(end: socket.socket, hit: Callable[[], None]) -> dict[str, Any]:
    ram = Memfd.create("ram", 0)
    ram.write(RAM, 0)
    event = os.eventfd(0)
    files = {"ram": ram} | {f"event {number}": event for number in range(COUNT - 1)}
    before = open_fds()
    sending: Sending | None = None
    global has_all

    def has_all() -> bool:
        if sending is None:
            return False
        machine = sending._machine
        return machine._state.index == COUNT and machine.pending is None

    def send() -> object:
        nonlocal sending
        sending = sending or Sending(end, files, STATE)
        note_built()
        if driver == "asyncio":
            return asyncio.run(sending.send_async(timeout=TIMEOUT))
        return sending.send(timeout=TIMEOUT)

    def abandon() -> None:
        if sending is None:
            end.shutdown(socket.SHUT_RDWR)
            return
        try:
            sending.abandon()
        except HandoffError:  # too late: the receiver may have them
            send()

    error = attempt(hit, send, abandon)
    if sending is not None and sending.owner is Owner.UNDECIDED:
        sending.take_back(timeout=TIMEOUT)
    return {
        "owner": sending.owner.value if sending is not None else "sender",
        "whole": digest(ram) == hashlib.sha256(RAM).hexdigest(),
        "error": error,
        "left open": 0 if struck_early else len(open_fds()) - len(before),
    }


def run_receiver(end: socket.socket, hit: Callable[[], None]) -> dict[str, Any]:
    before = open_fds()
    receiving: Receiving | None = None
    received: list[Handoff] = []
    global has_all

    def has_all() -> bool:
        return receiving is not None and receiving.owner is Owner.RECEIVER

    def receive() -> object:
        nonlocal receiving
        receiving = receiving or Receiving(end)
        note_built()
        try:
            if driver == "asyncio":
                received.append(asyncio.run(receiving.receive_async(timeout=TIMEOUT)))
            else:
                received.append(receiving.receive(timeout=TIMEOUT))
        except HandoffError as error:
            if error.unfinished is None:
                raise
            error.unfinished = None
            if driver == "asyncio":
                received.append(asyncio.run(receiving.take_over_async(timeout=TIMEOUT)))
            else:
                received.append(receiving.take_over(timeout=TIMEOUT))
        return received

    def abandon() -> None:
        if receiving is None:
            end.shutdown(socket.SHUT_RDWR)
            return
        receiving.abandon()
        if receiving.owner is Owner.RECEIVER:  # too late
            receive()

    error = attempt(hit, receive, abandon)
    whole = False
    if received:
        with received[-1] as handoff:
            ram = handoff.files["ram"]
            whole = (
                digest(ram) == hashlib.sha256(RAM).hexdigest()
                and len(handoff.files) == COUNT
                and handoff.state == STATE
            )
    missing = receiving.missing if receiving is not None else ()
    if receiving is not None and receiving.owner is not Owner.RECEIVER:
        receiving.abandon()
    return {
        "owner": receiving.owner.value if receiving is not None else "sender",
        "whole": whole,
        "error": error,
        "left open": 0 if struck_early else len(open_fds()) - len(before),
        "missing": len(missing),
    }


def attempt(
    hit: Callable[[], None], call: Callable[[], object], abandon: Callable[[], object]
) -> str:
    """Make a call while `hit` strikes, and go on as the blow demands; return the last error."""
    with suppress(Interrupted):
        try:
            hit()
            call()
        except HandoffError as error:
            return str(error)
        finally:
            sys.settrace(None)
        return ""
    try:
        abandon() if blow == "abandon" else call()
    except HandoffError as error:
        return str(error)
    return ""


def note_built() -> None:
    global is_built
    is_built = True


def digest(file: Any) -> str:
    return hashlib.sha256(os.pread(file.fileno(), len(RAM) + 1, 0)).hexdigest()


# The blows


def trace_lines(note: Callable[[str, int], None]) -> Callable[[], None]:
    """Return a function that begins to call `note` before each line of pyluo."""

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        if event == "line" and not is_in_finalizer(frame):
            note(name, frame.f_lineno)
        return trace

    return lambda: sys.settrace(trace)  # type: ignore[arg-type]


def is_in_finalizer(frame: FrameType | None) -> bool:
    """Return whether a frame belongs to a `__del__`, in which Python ignores exceptions."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def striking_at(point: Point) -> Callable[[], None]:
    count = 0

    def note(name: str, line: int) -> None:
        nonlocal count
        global struck_early
        if (name, line) == point[:2]:
            count += 1
            if count == point[2]:
                sys.settrace(None)
                if blow == "kill":
                    at_death[0] = has_all()
                    os.kill(os.getpid(), signal.SIGKILL)
                struck_early = not is_built
                raise Interrupted

    return trace_lines(note)


# The cases


def run(victim: str, hits: dict[str, Callable[[], None]]) -> dict[str, dict[str, Any] | None]:
    """Hand over between two new processes; return what each of them reports, unless it died."""
    ends = dict(
        zip(
            ("sender", "receiver"),
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
            strict=True,
        )
    )
    at_death[0] = False
    reports: dict[str, BinaryIO] = {}
    pids = []
    for side, function in (("sender", run_sender), ("receiver", run_receiver)):
        read_end, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                for other, end in ends.items():
                    if other != side:
                        end.close()
                report = function(ends[side], hits.get(side, lambda: None))
                os.write(writer, json.dumps(report).encode())
            except BaseException as error:
                os.write(writer, json.dumps({"crash": repr(error)}).encode())
            finally:
                os._exit(0)
        os.close(writer)
        pids.append(pid)
        reports[side] = open(read_end, "rb")  # noqa: SIM115
    for end in ends.values():
        end.close()
    result = {}
    for side, reader in reports.items():
        with reader:
            text = reader.read()
        result[side] = json.loads(text) if text else None
    for pid in pids:
        os.waitpid(pid, 0)
    return result


def find_points(victim: str) -> list[Point]:
    """Return a time at which each line is reached in an undisturbed call.

    These are the first and the last time for a death, and the first for an exception.
    """
    lines: Counter[tuple[str, int]] = Counter()
    reader, writer = os.pipe()

    def save() -> None:
        def note(name: str, line: int) -> None:
            os.write(writer, f"{name}\t{line}\n".encode())

        trace_lines(note)()

    pid = os.fork()  # because the pipe may not have room for all of it
    if not pid:
        os.close(reader)
        result = run(victim, {victim: save})
        os._exit(result["sender"] is None or result["sender"]["owner"] != "receiver")
    os.close(writer)
    with open(reader) as text:
        for line in text:
            name, number = line.split("\t")
            lines[name, int(number)] += 1
    assert os.waitpid(pid, 0)[1] == 0
    return [
        (name, number, which)
        for (name, number), count in lines.items()
        for which in sorted({1, count if blow == "kill" else 1})
    ]


def find_problem(victim: str, result: dict[str, dict[str, Any] | None]) -> str:
    """Return what is wrong with the outcome of a case; an empty string if nothing is."""
    sender, receiver = result["sender"], result["receiver"]
    for report in (sender, receiver):
        if report is not None and "crash" in report:
            return "it crashed"
        if report is not None and report["left open"]:
            return "descriptors were left open"
    if sender is None and receiver is None:
        return "both are dead"
    if sender is None:
        assert receiver is not None
        if receiver["owner"] == "receiver":
            return "" if receiver["whole"] else "the receiver took over less than everything"
        # Only a sender that dies before it has sent everything takes the memory with it.
        return "the receiver did not take over" if at_death[0] else ""
    if receiver is None:
        if sender["owner"] == "undecided":
            return "the sender does not know whether it has the files"
        if sender["owner"] == "receiver" and not at_death[0]:
            return "the sender gave the files to a receiver that did not take them"
        return "" if sender["whole"] else "the memory has changed"
    if sender["owner"] != receiver["owner"] or sender["owner"] == "undecided":
        return "they disagree about who has the files"
    if receiver["owner"] == "receiver" and not receiver["whole"]:
        return "the receiver has less than everything"
    if blow == "resume" and receiver["owner"] != "receiver":
        return "the call that was made again did not complete it"
    return ""


def main() -> None:
    global driver, blow
    driver, victim, blow = sys.argv[1:]
    warnings.simplefilter("ignore", ResourceWarning)  # objects are dropped wherever a blow falls
    gc.freeze()
    owners: Counter[str] = Counter()
    for point in find_points(victim):
        result = run(victim, {victim: striking_at(point)})
        problem = find_problem(victim, result)
        where = f"{os.path.relpath(point[0], PACKAGE)}:{point[1]}, time {point[2]}"
        if problem:
            print(json.dumps({"where": where, "problem": problem, "result": result}), flush=True)
        survivors = [each for each in result.values() if each is not None and "owner" in each]
        owners[" ".join(each["owner"] for each in survivors)] += 1
    print(json.dumps({"cases": owners.total(), "owners": owners}))


if __name__ == "__main__":
    main()
