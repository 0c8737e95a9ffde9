"""Encoding the table of contents of a descriptor store, and decoding it from any bytes."""

from __future__ import annotations

import errno
import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import FdStoreError
from pyluo.contents import VERSION, Contents, Entry, encode
from pyluo.contents import decode as decode_file

ROOM = 4096
HEADER = struct.Struct("<8sIIQQ")

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


@st.composite
def any_contents(draw: st.DrawFn) -> Contents:
    names = draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=5))
    tokens = draw(
        st.lists(st.integers(1, 2**64 - 1), unique=True, min_size=len(names), max_size=len(names))
    )
    entries = []
    for position, (name, token) in enumerate(zip(names, tokens, strict=True)):
        before = names[:position]
        entries.append(
            Entry(
                name=name,
                token=token,
                kind=draw(st.sampled_from(["memfd", "file"])),
                size=draw(st.integers(0, 2**63 - 1)),
                requires=tuple(draw(st.lists(st.sampled_from(before), unique=True)))
                if before
                else (),
                meta=draw(METADATA),
                preserved=draw(st.booleans()),
            )
        )
    return Contents(tuple(entries), draw(METADATA))


def decode(data: bytes) -> tuple[Contents, int, int]:
    return decode_file(lambda length, offset: data[offset : offset + length], len(data))


def slot(text: bytes, *, version: int = VERSION, generation: int = 1) -> bytes:
    """Return a slot with a valid header and any text, made from the description of the format."""
    header = HEADER.pack(b"pyluoFDS", version, 0, generation, len(text))
    check = zlib.crc32(text, zlib.crc32(header))
    return HEADER.pack(b"pyluoFDS", version, check, generation, len(text)) + text


def table(*slots: bytes, room: int = ROOM) -> bytes:
    return b"".join(part.ljust(room, b"\0") for part in (*slots, b"")[:2])


@given(any_contents(), st.integers(1, 2**63))
def test_what_is_written_is_read_back(contents: Contents, generation: int) -> None:
    written = encode(contents, generation, 1 << 16)
    assert decode(table(written, room=1 << 16)) == (contents, generation, 0)
    assert decode(table(b"", written, room=1 << 16)) == (contents, generation, 1)


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_store_error(data: bytes) -> None:
    with pytest.raises(FdStoreError) as caught:
        decode(data)
    assert caught.value.errno == errno.EBADMSG


def has_entries(text: bytes) -> bool:
    try:
        tree = json.loads(text)
    except ValueError:
        return False
    return isinstance(tree, dict) and "entries" in tree


TEXTS = st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode())


@given(TEXTS.filter(lambda text: not has_entries(text)))
def test_no_text_in_a_whole_slot_makes_anything_but_a_store_error(text: bytes) -> None:
    with pytest.raises(FdStoreError) as caught:
        decode(table(slot(text)))
    assert caught.value.errno == errno.EBADMSG


ENTRY = {
    "name": "a",
    "token": 1,
    "kind": "file",
    "size": 1,
    "requires": [],
    "meta": {},
    "settled": 1,
}
ATTRIBUTES = {"settled": "preserved"}  # keys of the JSON with another name in `Entry`
ANYTHING = JSON | st.sampled_from(["a", "b", ["a"], ["b"], {}, 0, 1, 2, True])
ENTRIES = st.lists(
    st.dictionaries(st.sampled_from(sorted(ENTRY)), ANYTHING, max_size=3).map(
        lambda changes: {**ENTRY, **changes}
    ),
    max_size=3,
)


@given(entries=ENTRIES | JSON, meta=METADATA | JSON, version=st.integers(1, VERSION))
def test_entries_of_any_kind_are_read_whole_or_refused(
    entries: Any, meta: Any, version: int
) -> None:
    text = json.dumps({"meta": meta, "entries": entries}).encode()
    try:
        contents, _, _ = decode(table(slot(text, version=version), room=1 << 16))
    except FdStoreError:
        return
    assert type(contents.meta) is dict
    before: set[str] = set()
    for entry in contents.entries:
        assert [type(getattr(entry, ATTRIBUTES.get(key, key))) for key in sorted(ENTRY)] == [
            str, dict, str, tuple, bool, int, int
        ]  # fmt: skip
        assert entry.name
        assert 0 < entry.token < 2**64
        assert set(entry.requires) <= before
        before.add(entry.name)
    assert len(before) == len(contents.entries)
    assert len({entry.token for entry in contents.entries}) == len(contents.entries)


def test_no_more_is_read_of_a_file_than_a_table_takes() -> None:
    lengths_read: list[int] = []

    def read(length: int, offset: int) -> bytes:
        lengths_read.append(length)
        return HEADER.pack(b"pyluoFDS", VERSION, 0, 1, 1 << 40)[:length]

    with pytest.raises(FdStoreError):
        decode_file(read, 1 << 41)
    assert sum(lengths_read) < 4096


@pytest.mark.parametrize("name", [5, "", None])
def test_a_name_that_could_not_be_read_back_is_not_written(name: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode(Contents((Entry(name, 1),)), 1, ROOM)


def test_a_table_is_as_long_before_its_files_are_in_as_after() -> None:
    lengths = {
        len(encode(Contents((Entry("a", 1, preserved=now),)), 1, ROOM)) for now in (False, True)
    }
    assert len(lengths) == 1


@pytest.mark.parametrize(
    "entries",
    [
        [ENTRY, ENTRY | {"token": 2}],
        [ENTRY, ENTRY | {"name": "b"}],
        [ENTRY | {"requires": ["b"]}, ENTRY | {"name": "b", "token": 2}],
        [ENTRY | {"token": 0}],
        [ENTRY | {"token": True}],
        [ENTRY | {"token": 2**64}],
        [{"name": "a", "token": 1}],
    ],
    ids=["name twice", "token twice", "order", "own token", "no number", "range", "fields"],
)
def test_a_table_that_contradicts_itself_is_refused(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(FdStoreError, match="cannot be understood"):
        decode(table(slot(json.dumps({"meta": {}, "entries": entries}).encode())))


def test_json_deeper_than_the_stack_is_damage() -> None:
    deep = b'{"meta":' + b"[" * 100_000 + b"]" * 100_000 + b',"entries":[]}'
    with pytest.raises(FdStoreError):
        decode(table(slot(deep), room=1 << 20))


def test_a_torn_write_leaves_the_table_before_it() -> None:
    old = encode(Contents((Entry("a", 1),)), 7, ROOM)
    new = encode(Contents((Entry("a", 1), Entry("b", 2))), 8, ROOM)
    older = encode(Contents(()), 6, ROOM)
    for length in range(len(new)):
        torn = new[:length] + older[length:].ljust(ROOM - length, b"\0")
        contents, generation, _ = decode(table(torn, old))
        assert (contents.entries, generation) == ((Entry("a", 1),), 7)
    assert decode(table(new, old))[1] == 8


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    written = bytearray(encode(Contents((Entry("a", 1),)), 1, ROOM))
    for position in range(len(written)):
        written[position] ^= 1
        with pytest.raises(FdStoreError):
            decode(table(bytes(written)))
        written[position] ^= 1


def test_a_table_of_version_1_is_read() -> None:
    text = json.dumps({"entries": [{"name": "ram", "token": 9, "meta": {"at": 1}}]}).encode()
    contents, _, _ = decode(table(slot(text, version=1)))
    assert contents == Contents((Entry("ram", 9, meta={"at": 1}),))


@pytest.mark.parametrize("text", [b"{}", b"\xff not json"])
def test_a_newer_version_is_named_and_not_looked_into(text: bytes) -> None:
    old = encode(Contents(), 1, ROOM)
    with pytest.raises(FdStoreError, match=f"version {VERSION + 1}") as caught:
        decode(table(slot(text, version=VERSION + 1, generation=2), old))
    assert caught.value.errno == errno.EPROTONOSUPPORT


def test_a_table_that_does_not_fit_is_refused_before_it_is_written() -> None:
    with pytest.raises(FdStoreError, match="table_size") as caught:
        encode(Contents((Entry("n" * ROOM, 1),)), 1, ROOM)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("meta", [{"a": object()}, {"a": float("nan")}])
def test_metadata_that_json_cannot_carry_is_refused(meta: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode(Contents(meta=meta), 1, ROOM)
