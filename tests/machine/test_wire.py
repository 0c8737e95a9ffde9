from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo.errors import TokenNotFoundError
from pyluo.guest import wire

scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
hashable = scalars | st.tuples(scalars, scalars)
values = st.recursive(
    scalars | st.floats(allow_nan=False) | st.sets(hashable) | st.frozensets(hashable),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(hashable, inner),
)


@given(values)
def test_a_value_crosses_unchanged_whatever_it_is_made_of(value: object) -> None:
    line = wire.to_line({"value": wire.encode(value)})
    assert line.count(b"\n") == 1
    message = wire.parse(line)
    assert message is not None
    assert is_same(wire.decode(message["value"]), value)


class Pair(NamedTuple):
    one: int
    other: bytes = b""


T = TypeVar("T")


@dataclass
class Counted:
    made: ClassVar[int] = 7
    start: InitVar[int]
    name: str
    serial: int = field(init=False)

    def __post_init__(self, start: int) -> None:
        self.serial = start + 1
        self.seen = {start}


@dataclass(frozen=True, slots=True)
class Slotted(Generic[T]):
    item: T
    length: int = field(init=False, default=3)


@dataclass
class Boxed(Generic[T]):
    item: T


@dataclass
class Listed(list[int]):
    name: str


class Text(str):
    """A string with a class of its own."""


class Bits(enum.Flag):
    A = 1
    B = 2


class Sign(enum.Enum):
    PLUS = object()
    LIKE_PLUS = PLUS


@pytest.mark.parametrize(
    "value",
    [
        Pair(1, b"2"),
        [Pair(3)],
        frozenset({1, (2,)}),
        {frozenset({1}): {2}},
        bytearray(b"3"),
        Counted(4, "n"),
        Slotted(b"5"),
        Boxed[int](6),
        Bits.A | Bits.B,
        Bits(0),
        Sign.PLUS,
        Path("/a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_back_as_an_object_of_its_class(value: Any) -> None:
    back = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert type(back) is type(value)
    assert back == value
    assert getattr(back, "__dict__", {}).get("seen") == getattr(value, "seen", None)


@pytest.mark.parametrize(
    "value",
    [
        Text("a"),
        OrderedDict(a=1),
        Counter("a"),
        Listed("n"),
        PurePosixPath("/a"),
        memoryview(b"a"),
        complex(1),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_arrive_as_something_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot cross"):
        wire.encode({"key": [value]})


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError, match="contains itself"):
        wire.encode(value)


@given(st.binary(max_size=200))
def test_no_line_makes_the_parser_raise(line: bytes) -> None:
    message = wire.parse(line)
    assert message is None or isinstance(message, dict)


@given(st.recursive(scalars.filter(lambda value: not isinstance(value, bytes)),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_what_was_never_encoded_decodes_to_a_value_or_a_value_error(message: object) -> None:
    with suppress(ValueError, TypeError, ImportError, AttributeError):
        wire.decode(json.loads(json.dumps(message)))


@pytest.mark.parametrize(
    "content", [["os:system", "true"], ["builtins:eval", "1"], ["subprocess:Popen", "true"]]
)
def test_only_enums_and_dataclasses_are_built_by_name(content: list[str]) -> None:
    with pytest.raises(ValueError, match="is not a"):
        wire.decode({"$enum": content})
    with pytest.raises(ValueError, match="is not a dataclass"):
        wire.decode({"$data": [content[0], {}]})


def test_the_host_imports_nothing_that_a_guest_names() -> None:
    assert "antigravity" not in sys.modules
    content = {"type": "antigravity:x", "arguments": [], "state": {}, "summary": "S"}
    error = wire.decode({"$error": content | {"traceback": "T"}}, find=wire.resolve_loaded)
    assert type(error) is RuntimeError
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="not imported"):
        wire.decode({"$enum": ["antigravity:x", 1]}, find=wire.resolve_loaded)
    hidden = {"type": "builtins:ValueError", "state": {"x": {"$data": ["antigravity:x", {}]}}}
    wire.decode({"$error": content | hidden | {"traceback": "T"}}, find=wire.resolve_loaded)
    assert "antigravity" not in sys.modules


def test_a_class_of_pyluos_own_is_found_though_nobody_used_it_yet() -> None:
    code = (
        "from pyluo.guest import wire\n"
        "value = wire.decode({'$enum': ['pyluo.memfd:Seal', 2]}, find=wire.resolve_loaded)\n"
        "assert value.name == 'SHRINK', value\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_guest_cannot_end_the_host() -> None:
    content = {"type": "builtins:SystemExit", "arguments": [], "state": {}, "summary": "S"}
    error = wire.decode({"$error": content | {"traceback": "T"}})
    assert type(error) is RuntimeError


def test_a_message_that_is_too_deep_is_no_message() -> None:
    assert wire.parse(b"[" * 100_000) is None


def test_an_exception_that_is_no_exception_class_stays_text() -> None:
    content = {"type": "os:system", "arguments": ["true"], "summary": "S", "traceback": "T"}
    error = wire.decode({"$error": content})
    assert type(error) is RuntimeError
    assert str(error) == "S"


def test_an_error_keeps_its_class_its_fields_and_the_trace() -> None:
    try:
        raise TokenNotFoundError(2, "REQUEST", "a subject")
    except TokenNotFoundError as error:
        back = wire.decode(json.loads(json.dumps(wire.encode(error))))
    assert isinstance(back, TokenNotFoundError)
    assert (back.errno, back.operation, back.subject) == (2, "REQUEST", "a subject")
    assert "test_an_error_keeps_its_class" in back.__notes__[0]


def test_a_held_object_is_an_argument_by_its_number() -> None:
    held = wire.GuestObject("boot", 7, "a thing")
    assert wire.decode(wire.encode([held]), lambda *name: {("boot", 7): "the thing"}[name]) == [
        "the thing"
    ]


def test_infinity_crosses() -> None:
    assert math.isinf(wire.decode(json.loads(json.dumps(wire.encode(math.inf)))))


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, where 1, True and 1.0 differ at every depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(is_same, one.items(), other.items()))
    return bool(one == other)
