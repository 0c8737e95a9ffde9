"""What hypothesis makes up for the tests of tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from pyluo.stores.entry import Contents, Entry
from pyluo.stores.records import Add, Meta, Record, Remove, Settle, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

LAST_TOKEN = (1 << 63) - 1

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
METADATA = st.dictionaries(st.text(max_size=8), JSON, max_size=3)
# The names of files can have bytes that are not UTF-8, which Python writes as such characters.
NAMES = st.text(
    st.characters(codec="utf-8") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    min_size=1,
    max_size=8,
)
TOKENS = st.integers(1, 12) | st.integers(1, LAST_TOKEN)
TEXTS = st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode())
ANYTHING = JSON | st.sampled_from(["a", "b", ["a"], ["b"], [1], {}, 0, 1, 2, True])
"""What may stand where something else is expected, and sometimes what is expected."""


def changed(tree: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return JSON objects that differ from this one in up to three of its members."""
    changes = st.dictionaries(st.sampled_from(sorted(tree)), ANYTHING, max_size=3)
    return changes.map(lambda changes: {**tree, **changes})


@st.composite
def new_entries(draw: st.DrawFn, contents: Contents, *, most: int = 3) -> tuple[Entry, ...]:
    """Return entries that can follow those of a store."""
    unused = NAMES.filter(lambda name: name not in contents.entries)
    names = draw(st.lists(unused, unique=True, max_size=most))
    entries: list[Entry] = []
    taken = set(contents.tokens)
    for name in names:
        free = TOKENS.filter(lambda token: token not in taken)
        tokens = draw(st.lists(free, unique=True, min_size=1, max_size=3))
        taken.update(tokens)
        before = [*contents.entries, *(entry.name for entry in entries)]
        entries.append(
            Entry(
                name=name,
                tokens=tuple(tokens),
                sizes=tuple(draw(st.integers(0, LAST_TOKEN)) for _ in tokens),
                kind=draw(st.sampled_from(["memfd", "ram", "file"])),
                requires=draw(names_among(before)),
                meta=draw(METADATA),
                state=draw(METADATA),
            )
        )
    return tuple(entries)


def names_among(names: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
    if not names:
        return st.just(())
    return st.lists(st.sampled_from(names), unique=True, max_size=4).map(tuple)


@st.composite
def any_contents(draw: st.DrawFn) -> Contents:
    entries = draw(new_entries(Contents(), most=4))
    unsettled = draw(names_among([entry.name for entry in entries]))
    return Contents(entries, draw(METADATA), unsettled, draw(st.just(0) | TOKENS))


@st.composite
def any_records(draw: st.DrawFn) -> list[Record]:
    """Return the records of a segment, each of which can follow the one before."""
    records: list[Record] = [Whole(draw(any_contents()))]
    contents = Contents()
    records[0].apply(contents)
    for kind in draw(st.lists(st.sampled_from([Add, Remove, Meta, Settle]), max_size=6)):
        record: Record
        if kind is Add:
            record = Add(draw(new_entries(contents)))
        elif kind is Remove:
            record = Remove(
                with_what_requires_them(contents, draw(names_among([*contents.entries])))
            )
        elif kind is Meta:
            name = draw(st.none() | st.sampled_from([None, *contents.entries]))
            record = Meta(name, draw(METADATA))
        else:
            record = Settle()
        record.apply(contents)
        records.append(record)
    return records


def with_what_requires_them(contents: Contents, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of entries, and of all entries that require these."""
    found: dict[str, None] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        found[name] = None
        pending += contents.dependents.get(name, ())
    return tuple(found)
