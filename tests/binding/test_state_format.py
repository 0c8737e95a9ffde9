"""Tests of files that have all of a state, or none."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import Memfd, RequestError, StateFormat

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = StateFormat("a format", 3)


@pytest.fixture
def memfd() -> Iterator[Memfd]:
    with Memfd.create("state", 4096) as memfd:
        yield memfd


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_state_is_read_as_it_was_written_whatever_was_there(first: bytes, second: bytes) -> None:
    with Memfd.create("state", 200) as memfd:
        FORMAT.write(memfd, first)
        FORMAT.write(memfd, second)
        assert FORMAT.read(memfd) == second


def test_a_state_of_just_the_room_fits_and_a_larger_one_leaves_the_file_as_it_was(
    memfd: Memfd,
) -> None:
    room = FORMAT.room(memfd)
    FORMAT.write(memfd, b"x" * room)
    with pytest.raises(ValueError, match="in a file of 4096 bytes"):
        FORMAT.write(memfd, b"y" * (room + 1))
    assert FORMAT.read(memfd) == b"x" * room


def test_an_empty_file_has_no_room() -> None:
    with Memfd.create("empty", 0) as empty:
        assert FORMAT.room(empty) == 0
        with pytest.raises(RequestError, match="0 bytes only"):
            FORMAT.read(empty)


@pytest.mark.parametrize(
    ("other", "number", "words"),
    [
        (StateFormat("another.", 3), errno.EBADMSG, "Nothing, or not all of it"),
        (StateFormat("a format", 4), errno.EPROTONOSUPPORT, "version 3; this program reads"),
    ],
)
def test_a_state_of_another_format_or_version_is_refused(
    memfd: Memfd, other: StateFormat, number: int, words: str
) -> None:
    FORMAT.write(memfd, b"state")
    with pytest.raises(RequestError, match=words) as caught:
        other.read(memfd)
    assert caught.value.errno == number


@pytest.mark.parametrize("name", ["", "seven c", "nine char"])
def test_the_name_of_a_format_has_eight_characters(name: str) -> None:
    with pytest.raises(ValueError, match="eight characters"):
        StateFormat(name, 1)


def test_the_name_of_a_format_is_ascii() -> None:
    with pytest.raises(UnicodeEncodeError):
        StateFormat("fünf.fü", 1)
