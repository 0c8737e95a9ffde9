"""Tests of the messages between the coordinator of an update and the VMMs."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import RequestError
from pyluo.update import messages
from pyluo.update.messages import Message, Progress, Unable, decode, encode

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SHORT = st.text(max_size=12)
FIELDS: dict[str, SearchStrategy[Any]] = {
    "str": SHORT,
    "int": st.integers(-(1 << 40), 1 << 40),
    "bool": st.booleans(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "float | None": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "list[str]": st.lists(SHORT, max_size=3),
}


def build(kind: Any) -> SearchStrategy[Any]:
    fields = {name: FIELDS[hint] for name, hint in kind.__annotations__.items()}
    if "version" in fields:
        fields["version"] = st.just(messages.VERSION)
    return st.builds(kind, **fields)


@given(st.one_of([build(kind) for kind in get_args(Message)]))
def test_a_message_is_read_as_it_was_written(message: Any) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=200) | st.recursive(st.none(), st.lists).map(json.dumps).map(str.encode))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode(data)
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    "change",
    [{"round": "1"}, {"round": True}, {"round": None}, {"sessions": [1]}, {"sessions": "vm0"},
     {"more": 1}, {"type": "ready"}, {"type": ["Ready"]}],
)  # fmt: skip
def test_a_member_of_another_type_is_refused(change: dict[str, object]) -> None:
    whole = {"type": "Ready", "round": 1, "sessions": ["vm0"]}
    decode(json.dumps(whole).encode())
    with pytest.raises(RequestError) as caught:
        decode(json.dumps(whole | change).encode())
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("limit", ["NaN", "Infinity"])
def test_a_number_that_is_none_is_refused(limit: str) -> None:
    text = f'{{"type": "Prepare", "round": 1, "limit": {limit}, "dry_run": true}}'
    with pytest.raises(RequestError, match="Prepare"):
        decode(text.encode())


def test_a_member_that_is_missing_is_refused() -> None:
    with pytest.raises(RequestError, match="Ready"):
        decode(b'{"type": "Ready", "round": 1}')


def test_a_message_of_another_version_is_refused_by_its_number() -> None:
    hello = {"type": "Hello", "version": 2, "name": "vm0", "stored": False, "paused": None}
    with pytest.raises(RequestError, match="uses version 2; this one uses 1") as caught:
        decode(json.dumps(hello).encode())
    assert caught.value.errno == errno.EPROTONOSUPPORT


def test_a_text_that_is_too_long_is_cut() -> None:
    for message in (
        Unable(round=1, reason="ü" * 5000),
        Progress(seconds=0, name="", text="x" * 5000),
    ):
        data = encode(message)
        assert len(data) <= 1024
        assert type(decode(data)) is type(message)


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="1024 are possible"):
        encode(Progress(seconds=0, name="x" * 2000, text=""))
