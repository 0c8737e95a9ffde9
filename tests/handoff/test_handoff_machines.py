"""The two machines of a handoff, joined by queues: any order of packets, deaths and refusals.

There is no socket here, and no process dies: the model says who is alive.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyluo import HandoffError, Memfd
from pyluo.descriptor import ReceivedFd
from pyluo.handoff.machine import Owner, Phase
from pyluo.handoff.packets import Kind, Outgoing
from pyluo.handoff.receiver import Receiver
from pyluo.handoff.sender import Sender
from pyluo.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyluo.handoff.machine import Machine

    Event = tuple[int, str, str]

SIDES = ("sender", "receiver")
OTHER = {"sender": "receiver", "receiver": "sender"}
PEERS = {"sender": Peer(1, 0, 0), "receiver": Peer(2, 0, 0)}
STEPS = 24  # a whole handoff takes 18 of them


class Delivered:
    """A packet, as a driver gives it to a machine."""

    data_truncated = fds_truncated = False

    def __init__(self, packet: Outgoing, sender: Peer) -> None:
        self.kind = packet.kind
        self.data = packet.data
        self.files = [ReceivedFd(os.dup(fd)) for fd in packet.fds]
        self.sender = sender

    def close(self) -> None:
        for file in self.files:
            file.close()


class Model:
    """Two machines, and what is between them."""

    def __init__(self, ram: Memfd, count: int) -> None:
        self.sender = Sender(
            {str(number): ram for number in range(count)}, b"state", lambda _: True
        )
        self.receiver = Receiver(lambda _: True, 10, 100)
        self.machines: dict[str, Machine] = {"sender": self.sender, "receiver": self.receiver}
        self.queues: dict[str, deque[Delivered]] = {side: deque() for side in SIDES}
        self.alive = set(SIDES)
        self.has_room = set(SIDES)
        self.sender_keeps = False

    def close(self) -> None:
        if self.receiver.taken is not None:
            self.receiver.taken.close()
        for side, machine in self.machines.items():
            machine.close()
            for packet in self.queues[side]:
                packet.close()

    def hears(self, side: str) -> bool:
        """Return whether a side has its end of the connection open."""
        ended = self.machines[side].phase in (Phase.DONE, Phase.FAILED)
        return side in self.alive and not ended

    def step(self, side: str) -> bool:
        """Do the next thing that a side can do; return whether there was one."""
        machine, other = self.machines[side], OTHER[side]
        before = machine._state, len(self.queues[side])
        if side not in self.alive:
            return False
        if machine.phase is Phase.BROKEN and not self.receiver.missing:
            self.receiver.claim(partial=False)
        if machine.awaits_death:
            if other not in self.alive:
                machine.peer_died()
        elif machine.pending is not None:
            self.send(side, machine.pending)
        elif not machine.done:
            self.receive(side)
        self.check()
        return (machine._state, len(self.queues[side])) != before

    def send(self, side: str, packet: Outgoing) -> None:
        machine, other = self.machines[side], OTHER[side]
        if not self.hears(other):
            machine.cannot_send(packet)
        elif side in self.has_room:
            self.queues[other].append(Delivered(packet, PEERS[side]))
            machine.sent(packet)
        elif packet.kind is Kind.REFUSED:
            machine.refusal_is_lost()

    def receive(self, side: str) -> None:
        machine, queue = self.machines[side], self.queues[side]
        if queue:
            packet: Any = queue.popleft()
            machine.receive(packet)
            if not (machine.last is packet and machine.keeps_files):
                packet.close()
        elif not self.hears(OTHER[side]):
            machine.hung_up(dead=OTHER[side] not in self.alive)

    def happen(self, side: str, what: str) -> None:
        match what:
            case "dies":
                self.alive.discard(side)
            case "gives up" if side in self.alive:
                self.machines[side].give_up(HandoffError(125, "test"))
            case "loses patience" if side in self.alive and not self.machines[side].awaits_death:
                self.machines[side].cannot_go_on(HandoffError(110, "test"))
            case "has no room":
                self.has_room.discard(side)
            case "has room":
                self.has_room.add(side)
        self.check()

    def check(self) -> None:
        sender, receiver = self.sender, self.receiver
        if "sender" in self.alive and sender.phase is Phase.FAILED:
            assert sender.owner is Owner.SENDER
            # It may hand them to somebody else now, who has them even when the sender is dead.
            self.sender_keeps = "receiver" in self.alive or self.sender_keeps
        if self.sender_keeps:
            assert receiver.owner is not Owner.RECEIVER
        if sender.owner is Owner.RECEIVER:
            assert receiver.owner is Owner.RECEIVER


@pytest.fixture(scope="module")
def ram() -> Iterator[Memfd]:
    with Memfd.create("ram", 4096) as ram:
        yield ram


EVENTS = st.lists(
    st.tuples(
        st.integers(0, STEPS),
        st.sampled_from(SIDES),
        st.sampled_from(["dies", "gives up", "loses patience", "has no room", "has room"]),
    ),
    max_size=3,
)


def run(ram: Memfd, count: int, order: Sequence[bool], events: Sequence[Event]) -> Model:
    """Run a handoff; at some steps, in the given order of the two sides, something happens."""
    model = Model(ram, count)
    try:
        for time, is_sender in enumerate(order):
            for when, side, what in events:
                if when == time:
                    model.happen(side, what)
            side = "sender" if is_sender else "receiver"
            model.step(side) or model.step(OTHER[side])
        model.has_room = set(SIDES)
        while model.step("sender") or model.step("receiver"):
            pass
    except BaseException:
        model.close()
        raise
    return model


@settings(max_examples=1000)
@given(
    count=st.integers(0, 2),
    order=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS),
    events=EVENTS,
)
def test_two_never_own_the_files_and_a_survivor_knows_whether_it_does(
    ram: Memfd, count: int, order: list[bool], events: list[Event]
) -> None:
    model = run(ram, count, order, events)
    try:
        owners = {side: machine.owner for side, machine in model.machines.items()}
        if model.alive == set(SIDES) and owners["sender"] is Owner.UNDECIDED:
            # The receiver could not say whether it took them: only its death can tell now.
            silent = {("receiver", "has no room"), ("receiver", "loses patience")}
            assert silent & {event[1:] for event in events}
            assert owners["receiver"] is not Owner.UNDECIDED
        elif model.alive == set(SIDES):
            assert owners["sender"] is owners["receiver"] is not Owner.UNDECIDED
        elif "sender" in model.alive:
            assert owners["sender"] is not Owner.UNDECIDED
        elif "receiver" in model.alive and owners["receiver"] is Owner.UNDECIDED:
            assert model.receiver.missing
        if owners["receiver"] is Owner.RECEIVER and "receiver" in model.alive:
            assert model.receiver.taken is not None
            assert len(model.receiver.taken.files) == count
    finally:
        model.close()


@pytest.mark.parametrize("count", [0, 2])
def test_a_handoff_in_which_nothing_happens_succeeds(ram: Memfd, count: int) -> None:
    model = run(ram, count, [], [])
    assert model.sender.owner is model.receiver.owner is Owner.RECEIVER
    model.close()


def test_a_receiver_takes_over_whenever_the_sender_dies_after_it_has_sent_all(ram: Memfd) -> None:
    outcomes = []
    for time in range(STEPS):
        model = run(ram, 2, [True] * STEPS, [(time, "sender", "dies")])
        outcomes.append(model.receiver.owner)
        model.close()
    first = outcomes.index(Owner.RECEIVER)
    assert set(outcomes[first:]) == {Owner.RECEIVER}
    assert Owner.RECEIVER not in outcomes[:first]
