"""Metadata of stores: what JSON makes of it, and what is refused."""

from __future__ import annotations

import math
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given

from pyluo.stores.entry import as_json_value
from tests.stores.strategies import JSON, METADATA


@given(METADATA | JSON)
def test_a_value_that_json_can_represent_stays_as_it_is(value: Any) -> None:
    made = as_json_value(value, "metadata")
    assert made == value
    assert type(made) is type(value)


def test_tuples_become_lists_at_any_depth() -> None:
    assert as_json_value({"a": (1, ("b", [(2,)]))}, "it") == {"a": [1, ["b", [[2]]]]}


def test_a_value_is_copied_so_that_its_owner_can_change_it() -> None:
    inner = {"b": [1]}
    made = as_json_value({"a": inner}, "it")
    inner["b"].append(2)
    assert made == {"a": {"b": [1]}}


def test_the_same_list_may_come_twice_if_it_does_not_contain_itself() -> None:
    shared = [1]
    assert as_json_value({"a": shared, "b": [shared, shared]}, "it") == {
        "a": [1],
        "b": [[1], [1]],
    }


@pytest.mark.parametrize("key", [1, None, True, 1.5, b"a", ("a",)])
def test_a_key_that_is_not_a_string_is_refused_and_named(key: Any) -> None:
    for value in ({key: 1}, {"a": [{"b": ({key: 1},)}]}):
        with pytest.raises(TypeError, match=r"metadata of 'ram' has the key .*only strings"):
            as_json_value(value, "metadata of 'ram'")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    for tree in (value, {"a": [value]}):
        with pytest.raises(ValueError, match=r"^it: "):
            as_json_value(tree, "it")


@pytest.mark.parametrize(
    "value",
    [object(), b"bytes", {1, 2}, 1j, print, MappingProxyType({})],
    ids=lambda value: type(value).__name__,
)
def test_an_object_that_json_does_not_know_is_refused(value: object) -> None:
    for tree in (value, {"a": (value,)}):
        with pytest.raises(TypeError, match=r"^it: "):
            as_json_value(tree, "it")


def test_what_contains_itself_is_refused() -> None:
    itself: list[Any] = []
    itself.append({"a": (itself,)})
    mapping: dict[str, Any] = {}
    mapping["b"] = [mapping]
    for value in (itself, mapping):
        with pytest.raises(ValueError, match="it contains itself"):
            as_json_value(value, "it")


@pytest.mark.parametrize("depth", [600, 100_000])
def test_what_is_nested_too_deeply_is_refused(depth: int) -> None:
    value: Any = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    with pytest.raises(ValueError, match="it is nested too deeply"):
        as_json_value(value, "it")


def test_numbers_of_other_classes_become_plain_numbers() -> None:
    class Number(IntEnum):
        ONE = 1

    made = as_json_value([Number.ONE, True], "it")
    assert made == [1, True]
    assert [type(each) for each in made] == [int, bool]
