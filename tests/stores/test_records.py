"""The table of a store: records written, read back, and read from any bytes."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import Entry, Memfd, StoreError, TokenNotFoundError
from pyluo.stores.entry import Contents, as_json_value
from pyluo.stores.journal import read_contents
from pyluo.stores.records import (
    Add,
    Meta,
    Record,
    Remove,
    Settle,
    Whole,
    decode_segment,
    encode_header,
    encode_record,
)
from tests.stores.strategies import (
    ANYTHING,
    JSON,
    LAST_TOKEN,
    METADATA,
    TEXTS,
    any_contents,
    any_records,
    changed,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EMPTY = {"op": "store", "entries": [], "meta": {}, "unsettled": [], "last_token": 0}
ENTRY = {
    "name": "a",
    "tokens": [1],
    "sizes": [1],
    "kind": "file",
    "requires": [],
    "meta": {},
    "state": {},
}
OTHER = ENTRY | {"name": "b", "tokens": [2]}
DEEPEST = 500
SECOND = 1 << 63
"""The token of a second segment."""


# The format, made from its description and not by the code that is tested.


def header(end: int, *, current: int = 0, version: int = 3) -> bytes:
    checked = struct.pack("<8sIIQQ", b"pyluoFDS", version, 0, 1, 0)
    check = struct.pack("<I", zlib.crc32(checked))
    return (checked[:12] + check + checked[16:] + struct.pack("<QQ", current, end)).ljust(64, b"\0")


def record(text: bytes, number: int) -> bytes:
    rest = struct.pack("<IQ", len(text), number) + text
    return (struct.pack("<I", zlib.crc32(rest)) + rest).ljust(16 + -(-len(text) // 8) * 8, b"\0")


def segment(
    *trees: Any, first: int = 7, current: int = 0, version: int = 3, behind: bytes = bytes(64)
) -> bytes:
    """Return a segment of records with any JSON, and with bytes behind its end."""
    texts = [tree if isinstance(tree, bytes) else json.dumps(tree).encode() for tree in trees]
    records = b"".join(record(text, number) for number, text in enumerate(texts, first))
    start = header(64 + len(records), current=current, version=version)
    return start + records + behind


def written(records: Sequence[Record], first: int = 0) -> bytes:
    """Return a segment that the code under test wrote."""
    data = b"".join(encode_record(each, number) for number, each in enumerate(records, first))
    return with_end(encode_header() + data, 64 + len(data))


def with_end(data: bytes, end: int) -> bytes:
    return data[:40] + struct.pack("<Q", end) + data[48:]


def decode(data: bytes) -> tuple[Contents, int]:
    return decode_segment(lambda length, offset: data[offset : offset + length], len(data))


def read(segments: Mapping[int, bytes] | bytes) -> Contents:
    """Return the contents in the files of a session, by their tokens; or in the one of token 0."""
    files = {0: segments} if isinstance(segments, bytes) else segments

    def retrieve(token: int) -> Memfd:
        if token not in files:
            raise TokenNotFoundError(errno.ENOENT, "retrieve", f"token {token}")
        memfd = Memfd.create("segment", 0)
        memfd.write(files[token], 0)
        return memfd

    return read_contents(retrieve)


def read_unless_damaged(data: bytes) -> Contents | None:
    """Return the contents of a table; None if it is refused as damaged."""
    try:
        return read(data)
    except StoreError as error:
        if error.errno != errno.EBADMSG:
            raise
    return None


def state(contents: Contents) -> dict[str, object]:
    """Return all that a `Contents` knows; what nobody requires may be in `dependents` or not."""
    return {
        "entries": list(contents.entries.items()),
        "meta": contents.meta,
        "unsettled": contents.unsettled,
        "last_token": contents.last_token,
        "tokens": contents.tokens,
        "dependents": {name: by for name, by in contents.dependents.items() if by},
    }


def applied(records: Sequence[Record]) -> Contents:
    contents = Contents()
    for each in records:
        each.apply(contents)
    return contents


def check_consistent(contents: Contents) -> None:
    """Check that contents are such as a store can have."""
    tokens: list[int] = []
    before: set[str] = set()
    for name, entry in contents.entries.items():
        assert name == entry.name
        assert set(entry.requires) <= before
        for text in (entry.name, entry.kind, *entry.requires):
            assert type(text) is str
            assert text
        assert all(type(token) is int and 0 < token <= LAST_TOKEN for token in entry.tokens)
        assert [type(size) for size in entry.sizes] == [int] * len(entry.tokens) != []
        assert type(entry.meta) is type(entry.state) is dict
        tokens += entry.tokens
        before.add(name)
    assert contents.tokens == set(tokens)
    assert len(contents.tokens) == len(tokens)
    assert type(contents.last_token) is int
    assert max(tokens, default=0) <= contents.last_token <= LAST_TOKEN
    assert type(contents.meta) is dict
    assert contents.unsettled <= before
    required = {
        needed: {name for name, entry in contents.entries.items() if needed in entry.requires}
        for needed in contents.entries
    }
    assert state(contents)["dependents"] == {name: by for name, by in required.items() if by}


@given(any_records(), st.integers(0, 1 << 60), st.binary(max_size=40))
def test_records_are_read_back_as_what_they_make_of_a_store(
    records: list[Record], first: int, behind: bytes
) -> None:
    contents, last = decode(written(records, first) + behind)
    check_consistent(contents)
    assert state(contents) == state(applied(records))
    assert last == first + len(records) - 1


@given(any_records())
def test_a_record_can_be_applied_again(records: list[Record]) -> None:
    twice = [each for each in records for _ in (1, 2)]
    assert state(applied(twice)) == state(applied(records))


@pytest.mark.parametrize("names", [("ram", "device"), ("device", "ram")])
def test_an_entry_is_removed_together_with_one_that_requires_it_in_any_order(
    names: tuple[str, str],
) -> None:
    entries = Entry("ram", (1,), (0,)), Entry("device", (2,), (0,), requires=("ram",))
    records = [Whole(Contents()), Add(entries), Remove(names), Add(entries)]
    for count, left in ((3, []), (4, ["ram", "device"])):
        assert list(applied(records[:count]).entries) == left
        assert state(read(written(records[:count]))) == state(applied(records[:count]))


@given(any_contents())
def test_contents_do_not_share_what_changes_with_the_record_that_they_came_from(
    contents: Contents,
) -> None:
    before = state(contents)
    copy = applied([Whole(contents)])
    copy.remove(list(copy.entries))
    copy.add([Entry("new", (LAST_TOKEN,), (0,))])
    assert state(contents) == before


def test_what_is_written_is_what_the_description_says() -> None:
    entry = Entry("ram", (1, 5), (4096, 0), "ram", ("a",), {"at": [1]}, {"nodes": [0]})
    described = {
        "name": "ram", "tokens": [1, 5], "sizes": [4096, 0], "kind": "ram", "requires": ["a"],
        "meta": {"at": [1]}, "state": {"nodes": [0]},
    }  # fmt: skip
    contents = Contents([Entry("a", (2,), (1,)), entry], {"k": None}, ["ram"], 9)
    pairs: list[tuple[Record, dict[str, Any]]] = [
        (Settle(), {"op": "settle"}),
        (Remove(("a", "b")), {"op": "remove", "names": ["a", "b"]}),
        (Add((entry,)), {"op": "add", "entries": [described]}),
        (Meta(None, {"k": 1}), {"op": "meta", "name": None, "meta": {"k": 1}}),
        (Meta("ram", {}), {"op": "meta", "name": "ram", "meta": {}}),
        (
            Whole(contents),
            {
                "op": "store",
                "entries": [ENTRY | {"tokens": [2]}, described],
                "meta": {"k": None},
                "unsettled": ["ram"],
                "last_token": 9,
            },
        ),
    ]
    assert encode_header() == header(64)
    for made, tree in pairs:
        data = encode_record(made, 300)
        length = int.from_bytes(data[4:8], "little")
        assert json.loads(data[16 : 16 + length]) == tree
        assert data == record(data[16 : 16 + length], 300)


def test_an_older_pyluo_recognizes_a_table_of_this_version() -> None:
    """It takes the header for one of an empty JSON, whose checksum is that of the header alone."""
    magic, version, check, generation, length = struct.unpack("<8sIIQQ", encode_header()[:32])
    assert (magic, version, generation, length) == (b"pyluoFDS", 3, 1, 0)
    assert check == zlib.crc32(struct.pack("<8sIIQQ", magic, version, 0, generation, length))


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_store_error(data: bytes) -> None:
    for attempt in (decode, read):
        with pytest.raises(StoreError) as caught:
            attempt(data)
        assert caught.value.errno == errno.EBADMSG


@given(st.binary(max_size=200))
def test_no_bytes_behind_a_header_make_anything_but_a_store_error(data: bytes) -> None:
    data = data.ljust(-(-len(data) // 8) * 8, b"\0")
    with pytest.raises(StoreError) as caught:
        read(header(64 + len(data)) + data)
    assert caught.value.errno == errno.EBADMSG


def has_operation(text: bytes) -> bool:
    try:
        tree = json.loads(text)
    except ValueError:
        return False
    return isinstance(tree, dict) and "op" in tree


@given(TEXTS.filter(lambda text: not has_operation(text)))
def test_no_text_in_a_whole_record_makes_anything_but_a_store_error(text: bytes) -> None:
    for trees in ([text], [EMPTY, text]):
        with pytest.raises(StoreError) as caught:
            read(segment(*trees))
        assert caught.value.errno == errno.EBADMSG


ENTRIES = st.lists(changed(ENTRY) | changed(OTHER), max_size=3) | JSON
STORES = st.builds(
    lambda tree, entries: {**tree, "entries": entries}, changed(EMPTY), ENTRIES
) | changed(EMPTY)
LATER = (
    st.fixed_dictionaries({"op": st.just("add"), "entries": ENTRIES})
    | st.fixed_dictionaries({"op": st.just("remove"), "names": ANYTHING})
    | st.fixed_dictionaries({"op": st.just("meta"), "name": ANYTHING, "meta": METADATA | ANYTHING})
    | st.fixed_dictionaries({"op": ANYTHING})
    | st.just({"op": "settle"})
    | STORES
)


@given(STORES, st.lists(LATER, max_size=3))
def test_records_of_any_json_are_read_whole_or_refused(first: Any, later: list[Any]) -> None:
    contents = read_unless_damaged(segment(first, *later))
    if contents is not None:
        check_consistent(contents)
        assert state(read(written([Whole(contents)]))) == state(contents)


@pytest.mark.parametrize(
    "entries",
    [
        [ENTRY, ENTRY | {"tokens": [2]}],
        [ENTRY, ENTRY | {"name": "b"}],
        [ENTRY | {"tokens": [1, 1], "sizes": [1, 1]}],
        [ENTRY | {"requires": ["b"]}, OTHER],
        [ENTRY | {"requires": ["a"]}],
        [ENTRY | {"tokens": [0]}],
        [ENTRY | {"tokens": [True]}],
        [ENTRY | {"tokens": [1 << 63]}],
        [ENTRY | {"tokens": [], "sizes": []}],
        [ENTRY | {"sizes": [1, 2]}],
        [ENTRY | {"sizes": [1.0]}],
        [ENTRY | {"sizes": [-1]}],
        [ENTRY | {"meta": {"a": [math.nan]}}],
        [ENTRY | {"name": ""}],
        [ENTRY | {"name": None}],
        [ENTRY | {"name": 5}],
        [ENTRY | {"meta": []}],
        [ENTRY | {"state": None}],
        [{"name": "a", "tokens": [1]}],
    ],
    ids=[
        "name twice", "token twice", "own token twice", "order", "requires itself", "table's token",
        "no number", "later segment's token", "no file", "sizes", "size", "negative", "not finite",
        "empty name", "null name", "number for a name", "no metadata", "no state", "fields",
    ],
)  # fmt: skip
def test_entries_that_contradict_themselves_are_refused(entries: list[dict[str, Any]]) -> None:
    for trees in ([EMPTY | {"entries": entries}], [EMPTY, {"op": "add", "entries": entries}]):
        with pytest.raises(StoreError, match=r"record [78]: ") as caught:
            read(segment(*trees))
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    "tree",
    [
        {"op": "add", "entries": [ENTRY]},
        {"op": "add", "entries": [OTHER | {"name": "c"}]},
        {"op": "remove", "names": ["a"]},
        {"op": "remove", "names": ["c"]},
        {"op": "remove", "names": "b"},
        {"op": "meta", "name": "c", "meta": {}},
        {"op": "meta", "name": None, "meta": []},
        {"op": "store", **EMPTY},
        {"op": "destroy"},
        {"op": ["settle"]},
        {},
    ],
    ids=[
        "name is there", "token is there", "required", "not there", "no list",
        "metadata of nothing", "no metadata", "begins again", "unknown", "list", "none",
    ],
)  # fmt: skip
def test_a_record_that_cannot_follow_those_before_it_is_refused(tree: dict[str, Any]) -> None:
    begun = EMPTY | {"entries": [ENTRY, OTHER | {"requires": ["a"]}]}
    with pytest.raises(StoreError, match="record 8: ") as caught:
        read(segment(begun, tree))
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    "changes", [{"unsettled": ["b"]}, {"last_token": -1}, {"last_token": 1 << 63}]
)
def test_a_whole_store_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="record 7: "):
        read(segment(EMPTY | {"entries": [ENTRY]} | changes))


def test_an_entry_may_have_the_token_of_one_that_was_removed() -> None:
    contents = read(
        segment(
            EMPTY | {"entries": [ENTRY, OTHER]},
            {"op": "remove", "names": ["b"]},
            {"op": "add", "entries": [OTHER | {"name": "c"}]},
        )
    )
    assert [(entry.name, entry.tokens) for entry in contents.entries.values()] == [
        ("a", (1,)),
        ("c", (2,)),
    ]


def test_the_token_of_an_entry_that_was_removed_is_remembered() -> None:
    trees = [EMPTY | {"entries": [ENTRY, OTHER]}, {"op": "remove", "names": ["b"]}]
    assert read(segment(*trees)).last_token == 2
    whole = Whole(read(segment(*trees)))
    assert decode(written([whole]))[0].last_token == 2


@pytest.mark.parametrize(
    ("later", "unsettled"),
    [
        ([], {"a", "b"}),
        ([{"op": "settle"}], set()),
        ([{"op": "meta", "name": None, "meta": {}}], set()),
        ([{"op": "remove", "names": ["b"]}], set()),
        ([{"op": "add", "entries": [ENTRY | {"name": "c", "tokens": [3]}]}], {"c"}),
    ],
    ids=["nothing", "settle", "metadata", "removal", "addition"],
)
def test_only_the_files_of_the_last_addition_may_be_missing(
    later: list[Any], unsettled: set[str]
) -> None:
    added = {"op": "add", "entries": [ENTRY, OTHER]}
    assert read(segment(EMPTY, added, *later)).unsettled == unsettled
    whole = EMPTY | {"entries": [ENTRY, OTHER], "unsettled": ["a", "b"]}
    assert read(segment(whole, *later)).unsettled == unsettled


def test_metadata_as_deep_as_it_may_be_is_read_back() -> None:
    meta: dict[str, Any] = {}
    for _ in range(DEEPEST):
        meta = {"a": meta}
    assert as_json_value(meta, "it") == meta
    entry = Entry("a", (1,), (0,), meta=meta)
    assert read(written([Whole(Contents([entry], meta))])).entries == {"a": entry}


def test_json_deeper_than_the_stack_is_damage() -> None:
    deep = b'{"meta":' + b"[" * 100_000 + b"]" * 100_000 + b',"op":"meta","name":null}'
    for trees in ([deep], [EMPTY, deep]):
        with pytest.raises(StoreError) as caught:
            read(segment(*trees))
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    ("numbers", "wrong"), [((7, 9), 9), ((7, 7), 7), ((7, 6), 6), ((0, 1, 0), 0)]
)
def test_records_that_are_not_numbered_one_after_the_other_are_refused(
    numbers: tuple[int, ...], wrong: int
) -> None:
    texts = [EMPTY, *[{"op": "settle"}] * (len(numbers) - 1)]
    data = b"".join(
        record(json.dumps(text).encode(), number)
        for text, number in zip(texts, numbers, strict=True)
    )
    with pytest.raises(StoreError, match=f"record {wrong} comes where") as caught:
        read(header(64 + len(data)) + data)
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    "tree", [{"op": "settle"}, {"op": "add", "entries": []}, {"op": "remove", "names": []}]
)
def test_a_segment_that_does_not_begin_with_the_whole_store_is_refused(tree: Any) -> None:
    with pytest.raises(StoreError, match="is not how a segment begins") as caught:
        read(segment(tree))
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("end", [0, 8, 56, 64, 65, 68, 76, 80, 96, 1 << 20, (1 << 64) - 8])
def test_an_end_that_is_not_behind_a_record_of_the_file_is_refused(end: int) -> None:
    data = segment(EMPTY, {"op": "settle"})
    last = len(data) - 64
    assert end != last
    with pytest.raises(StoreError) as caught:
        read(with_end(data, end))
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("difference", [-8, -1, 1, 8, 65, 1 << 20])
def test_an_end_that_is_a_little_off_is_refused(difference: int) -> None:
    data = segment(EMPTY, {"op": "settle"})
    with pytest.raises(StoreError) as caught:
        read(with_end(data, len(data) - 64 + difference))
    assert caught.value.errno == errno.EBADMSG


def test_an_end_before_the_last_record_gives_the_store_without_it() -> None:
    whole = segment(EMPTY, behind=b"")
    data = segment(EMPTY, {"op": "add", "entries": [ENTRY]}, behind=b"")
    assert list(read(data).entries) == ["a"]
    assert list(read(with_end(data, len(whole))).entries) == []


@pytest.mark.parametrize("length", [0, 7, 31, 32, 40, 47, 63])
def test_a_file_that_ends_within_the_header_is_damage(length: int) -> None:
    with pytest.raises(StoreError) as caught:
        read(segment(EMPTY)[:length])
    assert caught.value.errno == errno.EBADMSG


def test_every_flipped_bit_of_the_header_and_of_the_records_is_noticed() -> None:
    records = [
        Whole(Contents([Entry("a", (1,), (4096,))])),
        Add((Entry("b", (2,), (0,), requires=("a",)),)),
    ]
    data = written(records)
    offset, places = 64, [*range(32)]
    while offset < len(data):
        length = 16 + int.from_bytes(data[offset + 4 : offset + 8], "little")
        places += range(offset, offset + length)
        offset += -(-length // 8) * 8
    with Memfd.create("segment", len(data)) as memfd:
        memfd.write(data, 0)

        def read_it() -> Contents:
            return read_contents(lambda token: Memfd.from_fd(duplicate(memfd, token)))

        assert list(read_it().entries) == ["a", "b"]
        for place in places:
            for bit in range(8):
                memfd.write(bytes([data[place] ^ 1 << bit]), place)
                with pytest.raises(StoreError) as caught:
                    read_it()
                assert caught.value.errno == errno.EBADMSG
            memfd.write(data[place : place + 1], place)
        assert list(read_it().entries) == ["a", "b"]


def duplicate(memfd: Memfd, token: int) -> int:
    assert token == 0
    return os.dup(memfd.fileno())


BEFORE, AFTER = ["a"], ["a", "b"]


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"pyluoFDS"])
def test_a_torn_record_leaves_the_table_before_it(fill: bytes) -> None:
    old = written([Whole(Contents([Entry("a", (1,), (0,))]))])
    new = encode_record(Add((Entry("b", (2,), (0,)),)), 1)
    behind = (fill * len(new))[: len(new)]
    for length in range(len(new) + 1):
        torn = old + new[:length] + behind[length:]
        assert list(read(torn).entries) == BEFORE
    assert list(read(with_end(old + new, len(old + new))).entries) == AFTER


def test_a_torn_switch_to_another_segment_leaves_the_table_before_it() -> None:
    first = segment(EMPTY | {"entries": [ENTRY]}, first=3)
    second = segment(EMPTY | {"entries": [ENTRY, OTHER]}, first=4)
    for length in range(len(second)):
        torn = second[:length].ljust(len(second), b"\xff")
        assert list(read({0: first, SECOND: torn}).entries) == BEFORE
    switched = first[:32] + struct.pack("<Q", SECOND) + first[40:]
    assert list(read({0: switched, SECOND: second}).entries) == AFTER
    # The segment of token 0 is written again, for the next switch, while the other one is in use.
    for length in range(64, len(second)):
        torn = switched[:64] + second[64:length].ljust(len(second) - 64, b"\xff")
        assert list(read({0: torn, SECOND: second}).entries) == AFTER


@pytest.mark.parametrize("current", [1, 2, LAST_TOKEN])
def test_a_segment_in_use_that_is_the_file_of_an_entry_is_refused(current: int) -> None:
    files = {0: segment(EMPTY, current=current), current: segment(EMPTY)}
    with pytest.raises(StoreError, match=f"token {current} is no token of a table") as caught:
        read(files)
    assert caught.value.errno == errno.EBADMSG


def test_a_segment_in_use_that_is_missing_is_damage() -> None:
    with pytest.raises(StoreError) as caught:
        read({0: segment(EMPTY, current=SECOND)})
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("other", [b"", bytes(4096), segment(EMPTY, version=4), b"pyluoFDS" * 9])
def test_a_segment_in_use_without_a_header_of_this_version_is_refused(other: bytes) -> None:
    with pytest.raises(StoreError, match=f"the segment with token {SECOND}") as caught:
        read({0: segment(EMPTY, current=SECOND), SECOND: other})
    assert caught.value.errno == errno.EBADMSG


def test_the_records_of_a_segment_that_is_not_in_use_do_not_count() -> None:
    first = segment(EMPTY, {"op": "settle"}, first=50, current=SECOND + 1)
    damaged = with_end(first, 1)
    current = segment(EMPTY | {"entries": [ENTRY]}, first=2)
    assert list(read({0: damaged, SECOND: first, SECOND + 1: current}).entries) == ["a"]


@pytest.mark.parametrize("version", [4, 5, (1 << 32) - 1])
@pytest.mark.parametrize("text", [b"{}", b"\xff not json"])
def test_a_newer_version_is_named_and_not_looked_into(version: int, text: bytes) -> None:
    for data in (segment(text, version=version), segment(version=version)[:32]):
        with pytest.raises(StoreError, match=f"version {version}") as caught:
            read(data)
        assert caught.value.errno == errno.EPROTONOSUPPORT


def test_a_newer_version_whose_header_is_damaged_is_damage() -> None:
    data = bytearray(segment(EMPTY, version=4))
    data[20] ^= 1
    with pytest.raises(StoreError) as caught:
        read(bytes(data))
    assert caught.value.errno == errno.EBADMSG


def test_no_more_is_read_of_a_segment_than_its_records() -> None:
    data = segment(EMPTY, behind=b"")
    lengths: list[int] = []

    def read_part(length: int, offset: int) -> bytes:
        lengths.append(length)
        return data[offset : offset + length]

    assert decode_segment(read_part, 1 << 41)[1] == 7
    assert sum(lengths) <= len(data) + 64


@pytest.mark.parametrize("meta", [{"a": object()}, {"a": float("nan")}])
def test_metadata_that_json_cannot_represent_is_not_written(meta: dict[str, Any]) -> None:
    for made in (Meta(None, meta), Whole(Contents(meta=meta))):
        with pytest.raises((TypeError, ValueError)):
            encode_record(made, 1)
