"""Tables of the versions 1 and 2, made from their description: pyluo reads them."""

from __future__ import annotations

import errno
import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import Entry, StoreError
from pyluo.stores import version_2
from pyluo.stores.entry import Contents
from tests.stores.strategies import JSON, LAST_TOKEN, METADATA, TEXTS, any_contents, changed
from tests.stores.test_records import check_consistent, read, read_unless_damaged, state

ROOM = 4096
HEADER = struct.Struct("<8sIIQQ")
ENTRY = {
    "name": "a",
    "token": 1,
    "kind": "file",
    "size": 1,
    "requires": [],
    "meta": {},
    "settled": 1,
}
ENTRY_V1 = {"name": "a", "token": 1, "meta": {}}


def slot(text: bytes, *, version: int = 2, generation: int = 1) -> bytes:
    """Return a slot with a valid header and any text."""
    header = HEADER.pack(b"pyluoFDS", version, 0, generation, len(text))
    check = zlib.crc32(text, zlib.crc32(header))
    return HEADER.pack(b"pyluoFDS", version, check, generation, len(text)) + text


def table(*slots: bytes, room: int = ROOM) -> bytes:
    return b"".join(part.ljust(room, b"\0") for part in (*slots, b"")[:2])


def text_of(*entries: dict[str, Any], meta: Any = None) -> bytes:
    return json.dumps({"meta": meta or {}, "entries": entries}).encode()


def names(data: bytes) -> list[str]:
    return list(read(data).entries)


@st.composite
def contents_of_version_2(draw: st.DrawFn) -> Contents:
    """Return contents whose entries have one file each."""
    drawn = draw(any_contents())
    entries = [
        Entry(each.name, each.tokens[:1], each.sizes[:1], each.kind, each.requires, each.meta)
        for each in drawn.entries.values()
    ]
    return Contents(entries, drawn.meta, drawn.unsettled)


def write_version_2(contents: Contents) -> bytes:
    entries = [
        {
            "name": entry.name,
            "token": entry.tokens[0],
            "kind": entry.kind,
            "size": entry.sizes[0],
            "requires": entry.requires,
            "meta": entry.meta,
            "settled": int(entry.name not in contents.unsettled),
        }
        for entry in contents.entries.values()
    ]
    return text_of(*entries, meta=contents.meta)


@given(contents_of_version_2(), st.integers(1, 1 << 63))
def test_a_table_of_version_2_is_read(contents: Contents, generation: int) -> None:
    written = slot(write_version_2(contents), generation=generation)
    for slots in ([written], [b"", written]):
        assert state(read(table(*slots, room=1 << 16))) == state(contents)


def test_a_table_of_version_1_is_read() -> None:
    text = json.dumps({"entries": [{"name": "ram", "token": 9, "meta": {"at": 1}}]}).encode()
    expected = Contents([Entry("ram", (9,), (0,), meta={"at": 1})])
    assert state(read(table(slot(text, version=1)))) == state(expected)
    text = text_of({"name": "ram", "token": 9}, meta={"k": [1]})
    expected = Contents([Entry("ram", (9,), (0,))], {"k": [1]})
    assert state(read(table(slot(text, version=1)))) == state(expected)


@given(TEXTS.filter(lambda text: b"entries" not in text), st.sampled_from([1, 2]))
def test_no_text_in_a_whole_slot_makes_anything_but_a_store_error(
    text: bytes, version: int
) -> None:
    with pytest.raises(StoreError) as caught:
        read(table(slot(text, version=version)))
    assert caught.value.errno == errno.EBADMSG


ENTRIES = st.lists(changed(ENTRY) | changed(ENTRY_V1), max_size=3)


@given(entries=ENTRIES | JSON, meta=METADATA | JSON, version=st.sampled_from([1, 2]))
def test_entries_of_any_kind_are_read_whole_or_refused(
    entries: Any, meta: Any, version: int
) -> None:
    text = json.dumps({"meta": meta, "entries": entries}).encode()
    contents = read_unless_damaged(table(slot(text, version=version), room=1 << 16))
    if contents is not None:
        check_consistent(contents)
        assert all(len(entry.tokens) == 1 for entry in contents.entries.values())


@pytest.mark.parametrize(
    "entries",
    [
        [ENTRY, ENTRY | {"token": 2}],
        [ENTRY, ENTRY | {"name": "b"}],
        [ENTRY | {"requires": ["b"]}, ENTRY | {"name": "b", "token": 2}],
        [ENTRY | {"token": 0}],
        [ENTRY | {"token": True}],
        [ENTRY | {"token": LAST_TOKEN + 1}],
        [ENTRY | {"settled": 2}],
        [ENTRY | {"settled": True}],
        [ENTRY | {"size": -1}],
        [ENTRY | {"requires": "b"}, ENTRY | {"name": "b", "token": 2}],
        [{"name": "a", "token": 1}],
    ],
    ids=[
        "name twice", "token twice", "order", "own token", "no number", "range", "settled", "truth",
        "size", "no list", "fields",
    ],
)  # fmt: skip
def test_a_table_that_contradicts_itself_is_refused(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(StoreError, match="Error: ") as caught:
        read(table(slot(text_of(*entries))))
    assert caught.value.errno == errno.EBADMSG


def test_json_deeper_than_the_stack_is_damage() -> None:
    deep = b'{"meta":' + b"[" * 100_000 + b"]" * 100_000 + b',"entries":[]}'
    with pytest.raises(StoreError):
        read(table(slot(deep), room=1 << 20))


def test_a_torn_slot_leaves_the_table_before_it() -> None:
    old = slot(text_of(ENTRY), generation=7)
    new = slot(text_of(ENTRY, ENTRY | {"name": "b", "token": 2}), generation=8)
    older = slot(text_of(), generation=6)
    for length in range(len(new)):
        torn = new[:length] + older[length:].ljust(ROOM - length, b"\0")
        assert names(table(torn, old)) == names(table(old, torn)) == ["a"]
    assert names(table(new, old)) == names(table(old, new)) == ["a", "b"]


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    written = bytearray(slot(text_of(ENTRY)))
    for position in range(len(written)):
        for bit in range(8):
            written[position] ^= 1 << bit
            with pytest.raises(StoreError):
                read(table(bytes(written)))
            written[position] ^= 1 << bit


def test_the_slot_of_a_version_that_never_was_does_not_count() -> None:
    text = text_of(ENTRY)
    assert names(table(slot(text_of(), version=0, generation=9), slot(text))) == ["a"]
    with pytest.raises(StoreError) as caught:
        read(table(slot(text, version=0)))
    assert caught.value.errno == errno.EBADMSG


def test_no_more_is_read_of_a_file_than_a_table_takes() -> None:
    lengths_read: list[int] = []

    def read_part(length: int, offset: int) -> bytes:
        lengths_read.append(length)
        return HEADER.pack(b"pyluoFDS", 2, 0, 1, 1 << 40)[:length]

    with pytest.raises(StoreError):
        version_2.decode(read_part, 1 << 41)
    assert sum(lengths_read) < 4096
