"""Compare random requests on stores, some of them interrupted, with a small model of a store."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import random_requests
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pyluo.vm import VM
from stores import guest_store_machine

if TYPE_CHECKING:
    from pyluo.vm import Kernel

USUAL = 250
STEPS = int(os.environ.get("PYLUO_MACHINE_STEPS", USUAL))
RUN = 40  # steps of one run, which begins without stores
SPACING = 8  # the least number of steps between two jumps
NAMES = ["s", "t"]
ENTRIES = ["a", "b", "c", "d", "e"]
# Long texts fill the segments of the table.
METADATA = st.dictionaries(
    st.sampled_from(["x", "y"]),
    st.none() | st.integers() | st.text(max_size=8) | st.just("t" * 30_000),
    max_size=2,
)
# How often each answer of the model must occur at least.
ANSWERS = {
    ("create", "done"): 5,
    ("create", "SessionExistsError"): 1,
    ("add", "done"): 10,
    ("add", "StoreError"): 1,
    ("set_meta", "done"): 5,
    ("remove", "done"): 2,
    ("discard", "done"): 1,
    ("retrieve", "done"): 5,
    ("get", "done"): 5,
    ("renew", "done"): 3,
    ("finish", "done"): 1,
    ("finish", "StoreError"): 1,
    ("interrupted", "done"): 20,
    ("live_update", "done"): 5,
}


@dataclass
class Entry:
    """An entry, in the model."""

    content: int
    requires: list[str]
    meta: dict[str, Any]


@dataclass
class Store:
    """A store, in the model.

    Attributes:
        state: "outgoing", "handed over" until it is retrieved, or "incoming".
        reachable: whether the guest has an object for it.
    """

    state: str = "outgoing"
    reachable: bool = True
    entries: dict[str, Entry] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)

    def describe(self) -> Any:
        listed = [(name, tuple(one.requires), one.meta) for name, one in self.entries.items()]
        return listed, self.meta

    def needing(self, names: list[str]) -> bool:
        """Return whether other entries require one of these."""
        return any(
            set(one.requires) & set(names)
            for name, one in self.entries.items()
            if name not in names
        )


class Machine(RuleBasedStateMachine):
    """Random requests, each made to the guest and to the model."""

    vm: ClassVar[VM]
    answers: ClassVar[Counter[tuple[str, str]]] = Counter()
    contents: ClassVar[Any] = count(1)

    def __init__(self) -> None:
        super().__init__()
        self.stores: dict[str, Store] = {}
        self.steps_since_jump = 0
        Machine.vm.call(guest_store_machine.clear, NAMES)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.steps_since_jump += 1
        name = data.draw(st.sampled_from(NAMES))
        store = self.stores.get(name)
        if self.steps_since_jump > SPACING and data.draw(st.integers(0, 9)) == 0:
            self.live_update()
        elif store is None:
            self.expect(data, "done", "create", name)
            self.stores[name] = Store()
        elif store.state == "handed over" or not store.reachable:
            self.take_up(data, name, store)
        elif store.state == "outgoing":
            getattr(self, data.draw(st.sampled_from(OUTGOING)))(data, name, store)
        else:
            getattr(self, data.draw(st.sampled_from(INCOMING)))(data, name, store)

    def expect(self, data: st.DataObject, kind: str, operation: str, *arguments: Any) -> Any:
        """Make a request, which may be interrupted first; return the result."""
        at = data.draw(st.sampled_from([0, 0, 0, 1]).flatmap(lambda w: st.integers(0, w * 400)))
        answer, result = Machine.vm.call(
            guest_store_machine.attempt, operation, *arguments, interrupted_at=at
        )
        Machine.answers[operation, answer] += 1
        Machine.answers["interrupted", answer] += bool(at)
        assert answer == kind, (operation, arguments, at, result)
        return result

    def live_update(self) -> None:
        self.steps_since_jump = 0
        Machine.vm.live_update()
        Machine.answers["live_update", "done"] += 1
        self.stores = {
            name: store for name, store in self.stores.items() if store.state == "outgoing"
        }
        for store in self.stores.values():
            store.state, store.reachable = "handed over", True
            store.open.clear()

    def take_up(self, data: st.DataObject, name: str, store: Store) -> None:
        if store.state == "outgoing":  # its object was dropped: it waits for the jump
            self.expect(data, "SessionExistsError", "create", name)
            return
        described, lost = self.expect(data, "done", "retrieve", name)
        assert (described, lost) == (store.describe(), ())
        store.state, store.reachable = "incoming", True

    def add(self, data: st.DataObject, name: str, store: Store) -> None:
        names = data.draw(st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=3, unique=True))
        before = sorted(store.entries)
        new = [
            (
                each,
                next(Machine.contents),
                data.draw(
                    st.lists(st.sampled_from(before), min_size=1, max_size=2, unique=True)
                    if before
                    else st.sampled_from([[], [], ["z"]])
                ),
                data.draw(METADATA),
            )
            for each in names
        ]
        refused = any(
            each in store.entries or not set(requires) <= set(before)
            for each, _, requires, _ in new
        )
        self.expect(data, "StoreError" if refused else "done", "add", name, new)
        if not refused:
            for each, content, requires, meta in new:
                store.entries[each] = Entry(content, requires, meta)

    def set_meta(self, data: st.DataObject, name: str, store: Store) -> None:
        entry = data.draw(st.none() | st.sampled_from(ENTRIES))
        meta = data.draw(METADATA)
        if entry is not None and entry not in store.entries:
            self.expect(data, "KeyError", "set_meta", name, meta, entry)
            return
        self.expect(data, "done", "set_meta", name, meta, entry)
        if entry is None:
            store.meta = meta
        else:
            store.entries[entry].meta = meta

    def remove(self, data: st.DataObject, name: str, store: Store) -> None:
        if not store.entries:
            return
        needed = [each for each in sorted(store.entries) if store.needing([each])]
        every = sorted(store.entries)
        choice = data.draw(st.sampled_from([needed or every, every]))
        names = data.draw(st.lists(st.sampled_from(choice), min_size=1, max_size=2, unique=True))
        if store.needing(names):
            self.expect(data, "StoreError", "remove", name, names)
            return
        self.expect(data, "done", "remove", name, names)
        for each in names:
            del store.entries[each]

    def discard(self, data: st.DataObject, name: str, store: Store) -> None:
        self.expect(data, "done", "discard", name)
        del self.stores[name]

    def look(self, data: st.DataObject, name: str, store: Store) -> None:
        assert self.expect(data, "done", "look", name) == store.describe()

    def drop(self, data: st.DataObject, name: str, store: Store) -> None:
        Machine.vm.call(guest_store_machine.drop, name)
        store.reachable = False
        store.open.clear()  # the next object does not know what the last one gave out

    def get(self, data: st.DataObject, name: str, store: Store) -> None:
        if not store.entries:
            return
        entry = data.draw(st.sampled_from(sorted(store.entries)))
        keep_open = entry not in store.open and data.draw(st.booleans())
        content = self.expect(data, "done", "get", name, entry, keep_open)
        assert content == store.entries[entry].content
        if keep_open:
            store.open.add(entry)

    def renew(self, data: st.DataObject, name: str, store: Store) -> None:
        needed = [each for each in sorted(store.entries) if store.needing([each])]
        every = sorted(store.entries)
        choice = data.draw(st.sampled_from([needed or every, every]))
        destroy = data.draw(st.lists(st.sampled_from(choice or ["z"]), max_size=1, unique=True))
        if not set(destroy) <= store.entries.keys() or store.needing(destroy):
            self.expect(data, "StoreError", "renew", name, destroy)
            return
        self.expect(data, "done", "renew", name, destroy)
        for each in destroy:
            del store.entries[each]
        store.state = "outgoing"

    def finish(self, data: st.DataObject, name: str, store: Store) -> None:
        destroy = data.draw(
            st.just(sorted(store.entries))
            | st.lists(st.sampled_from(sorted(store.entries) or ["z"]), max_size=2, unique=True)
        )
        if not set(destroy) <= store.entries.keys() or set(store.entries) - {
            *store.open,
            *destroy,
        }:
            self.expect(data, "StoreError", "finish", name, destroy)
            return
        self.expect(data, "done", "finish", name, destroy)
        del self.stores[name]


OUTGOING = ["add", "add", "add", "set_meta", "remove", "look", "discard", "drop"]
INCOMING = ["get", "get", "renew", "renew", "finish", "look", "drop"]


def test_any_order_of_requests_interruptions_and_jumps_loses_nothing(kernel: Kernel) -> None:
    Machine.answers = Counter()
    with VM(kernel) as vm:
        Machine.vm = vm
        random_requests.run(Machine, Machine.answers, ANSWERS, steps=STEPS, usual=USUAL, length=RUN)
    assert random_requests.find_rare(Machine.answers, ANSWERS) == []
