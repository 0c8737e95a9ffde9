"""Layouts as JSON: what is written is read back, and damage is noticed."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import IoasLayout, IoasLayoutError
from pyluo.iommu_layout import NamedMapping
from pyluo.iommufd import Access, IovaRange

PAGE = 4096
READ_WRITE = Access.READ | Access.WRITE
LAYOUT = IoasLayout(
    (
        NamedMapping(0, 16 * PAGE, READ_WRITE, "ram", 0),
        NamedMapping(16 * PAGE, PAGE, Access.READ, "rom", 4 * PAGE),
        NamedMapping((1 << 64) - PAGE, PAGE, Access.WRITE, "ram", 16 * PAGE),
    ),
    (IovaRange(0, (1 << 39) - 1),),
)


@st.composite
def layouts(draw: st.DrawFn) -> IoasLayout:
    edges = sorted(draw(st.sets(st.integers(0, (1 << 52) - 1), max_size=12)))
    mappings = tuple(
        NamedMapping(
            start * PAGE,
            (end - start) * PAGE,
            draw(st.sampled_from([Access.READ, Access.WRITE, READ_WRITE])),
            draw(st.text()),
            draw(st.integers(0, 1 << 63)),
        )
        for start, end in zip(edges[::2], edges[1::2], strict=False)
    )
    return IoasLayout(mappings)


@given(layouts())
def test_what_json_carried_is_the_same_layout(layout: IoasLayout) -> None:
    assert IoasLayout.from_json(json.loads(json.dumps(layout.as_json()))) == layout


def test_the_last_byte_of_64_bits_can_be_mapped() -> None:
    assert IoasLayout.from_json(LAYOUT.as_json()) == LAYOUT
    assert LAYOUT.mappings[-1].range.last == (1 << 64) - 1


def test_numbers_are_text_in_json() -> None:
    assert LAYOUT.as_json()["mappings"][1] == {
        "iova": "0x10000",
        "length": "0x1000",
        "access": "r",
        "file": "rom",
        "offset": "0x4000",
    }


def test_a_newer_version_is_named() -> None:
    with pytest.raises(IoasLayoutError, match="version 2") as caught:
        IoasLayout.from_json(LAYOUT.as_json() | {"version": 2})
    assert caught.value.errno == errno.EPROTONOSUPPORT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_anything_else_is_refused_as_damaged(data: Any) -> None:
    with pytest.raises(IoasLayoutError):
        IoasLayout.from_json(data)


@given(st.data())
def test_a_damaged_layout_is_another_layout_or_refused(data: st.DataObject) -> None:
    whole = LAYOUT.as_json()
    where = data.draw(st.sampled_from(sorted(whole)))
    replaced = data.draw(json_values)
    if where == "mappings" and data.draw(st.booleans()):
        field = data.draw(st.sampled_from(["iova", "length", "access", "file", "offset"]))
        whole["mappings"][1][field] = replaced
    else:
        whole[where] = replaced
    try:
        read = IoasLayout.from_json(whole)
    except IoasLayoutError:
        return
    assert IoasLayout.from_json(read.as_json()) == read


@pytest.mark.parametrize(
    "mappings",
    [
        [NamedMapping(0, 0, READ_WRITE, "ram", 0)],
        [NamedMapping(0, -1, READ_WRITE, "ram", 0)],
        [NamedMapping(-1, PAGE, READ_WRITE, "ram", 0)],
        [NamedMapping(0, PAGE, READ_WRITE, "ram", -1)],
        [NamedMapping(0, PAGE, Access(0), "ram", 0)],
        [NamedMapping((1 << 64) - PAGE, PAGE + 1, READ_WRITE, "ram", 0)],
        [
            NamedMapping(0, 2 * PAGE, READ_WRITE, "ram", 0),
            NamedMapping(PAGE, PAGE, READ_WRITE, "ram", 0),
        ],
        [
            NamedMapping(PAGE, PAGE, READ_WRITE, "ram", 0),
            NamedMapping(0, PAGE, READ_WRITE, "ram", 0),
        ],
    ],
)
def test_a_layout_that_no_ioas_can_have_is_refused(mappings: list[NamedMapping]) -> None:
    with pytest.raises(IoasLayoutError) as caught:
        IoasLayout(tuple(mappings))
    assert caught.value.errno == errno.EINVAL
