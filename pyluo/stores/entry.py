"""`Entry` and `Contents`: what a store has in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from pyluo.descriptor import OwnedFd
    from pyluo.guest_ram import GuestRam

__all__ = ["FIRST_TABLE_TOKEN", "Contents", "Entry", "NewEntry", "as_json_value"]

FIRST_TABLE_TOKEN = 1 << 63
"""The tokens from here on, and token 0, belong to the table; those between them to entries."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a store: a file with a name, or several files that make up one thing.

    Attributes:
        name: the entry's name in the store.
        tokens: the token of each file in the session.
        sizes: the size of each file in bytes when the entry was added; 0 if a file has no size.
        kind: "memfd", "ram" for a `GuestRam`, or "file" if the file has no class of its own.
        state: what the class of its kind recorded, such as the NUMA policies of a `GuestRam`.
        requires: the names of earlier entries that this entry needs.
        meta: metadata from the owner of the store, as JSON represents it.
    """

    name: str
    tokens: tuple[int, ...]
    sizes: tuple[int, ...]
    kind: str = "file"
    requires: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The size of all files of the entry together, in bytes."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class NewEntry:
    """An entry to add to a store; see `OutgoingStore.add` for the fields."""

    name: str
    file: OwnedFd | int | GuestRam
    requires: Collection[str] = ()
    meta: Mapping[str, Any] | None = None


class Contents:
    """The contents of a store.

    The methods that change the contents can be interrupted anywhere, and called again.

    Attributes:
        entries: the entries by their names, in order; an entry comes after those that it requires.
        meta: the metadata of the store.
        unsettled: the names of the entries whose files the jump may have found not yet preserved.
        tokens: the tokens of all files.
        last_token: the greatest token that an entry has, or that a removed entry had. The file of a
            removed entry is still in the session, so no other file can have its token.
        dependents: for each name, the names of the entries that require it.
    """

    __slots__ = ("dependents", "entries", "last_token", "meta", "tokens", "unsettled")

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        meta: dict[str, Any] | None = None,
        unsettled: Iterable[str] = (),
        last_token: int = 0,
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.meta: dict[str, Any] = meta or {}
        self.dependents: dict[str, set[str]] = {}
        self.tokens: set[int] = set()
        self.last_token: int = 0
        self.add(entries)
        self.unsettled: frozenset[str] = frozenset(unsettled)
        self.last_token = max(self.last_token, last_token)

    def add(self, entries: Iterable[Entry]) -> None:
        """Append entries."""
        for entry in entries:
            for needed in entry.requires:
                self.dependents.setdefault(needed, set()).add(entry.name)
            self.last_token = max(self.last_token, *entry.tokens)
            self.tokens.update(entry.tokens)
            self.entries[entry.name] = entry

    def remove(self, names: Iterable[str]) -> None:
        """Remove entries; names that are not there are ignored."""
        for name in names:
            if (entry := self.entries.get(name)) is not None:
                for needed in entry.requires:
                    self.dependents.get(needed, set()).discard(name)
                self.dependents.pop(name, None)
                self.tokens.difference_update(entry.tokens)
                del self.entries[name]

    def check_addition(self, entries: Iterable[Entry]) -> None:
        """Raise ValueError if these entries cannot follow those that are there."""
        names: set[str] = set()
        tokens: set[int] = set()
        for entry in entries:
            if entry.name in names or entry.name in self.entries:
                raise ValueError(f"entry {entry.name!r} comes twice")
            for needed in entry.requires:
                if needed not in names and needed not in self.entries:
                    raise ValueError(f"{entry.name!r} requires {needed!r}, which is not before it")
            for token in entry.tokens:
                if token in tokens or token in self.tokens:
                    raise ValueError(f"entry {entry.name!r}: token {token} is used twice")
                tokens.add(token)
            names.add(entry.name)

    def check_removal(self, names: Sequence[str]) -> None:
        """Raise KeyError or ValueError if these entries cannot be removed."""
        removed = set(names)
        for name in names:
            self.entries[name]
            if needing := self.dependents.get(name, set()) - removed:
                raise ValueError(f"{sorted(needing)} require {name!r}")


def as_json_value(value: Any, what: str) -> Any:
    """Return what JSON makes of a value, in which tuples become lists.

    Raises:
        TypeError: JSON cannot represent the value, or it has a key that is not a string.
        ValueError: the value is not finite, contains itself, or is nested too deeply.
    """
    _check_keys(value, what, frozenset())
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _check_keys(value: Any, what: str, containers: frozenset[int]) -> None:
    """Refuse keys that are not strings: JSON would change them, or make two of them the same."""
    if isinstance(value, (str, int, float, type(None))):
        return
    if id(value) in containers:
        raise ValueError(f"{what} contains itself")
    if len(containers) > 500:
        raise ValueError(f"{what} is nested too deeply")
    inside = containers | {id(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{what} has the key {key!r}: JSON has only strings as keys")
            _check_keys(item, what, inside)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_keys(item, what, inside)
