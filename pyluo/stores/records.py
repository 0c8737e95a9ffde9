"""The records of a store's table, and their encoding; see docs/reference/store-format.md."""

from __future__ import annotations

import errno
import json
import struct
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from pyluo.errors import StoreError
from pyluo.stores.entry import FIRST_TABLE_TOKEN, Contents, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "CURRENT_OFFSET",
    "END_OFFSET",
    "HEADER",
    "MAGIC",
    "RECORDS_OFFSET",
    "VERSION",
    "Add",
    "Meta",
    "Record",
    "Remove",
    "Settle",
    "Whole",
    "check_metadata",
    "check_name",
    "check_token",
    "damage_error",
    "decode_segment",
    "encode_header",
    "encode_record",
]

VERSION = 3
MAGIC = b"pyluoFDS"
HEADER = struct.Struct("<8sIIQQ")
CURRENT_OFFSET = 32
END_OFFSET = 40
RECORDS_OFFSET = 64
_RECORD = struct.Struct("<IIQ")
_ENTRY_TOKENS = range(1, FIRST_TABLE_TOKEN)


class Record:
    """A change of a store's contents.

    Applying a record twice has the same effect as applying it once.
    """

    op: ClassVar[str]

    def apply(self, contents: Contents) -> None:
        """Change the contents as the record says."""
        raise NotImplementedError

    def members(self) -> dict[str, Any]:
        """Return the members of the JSON object, apart from "op"."""
        return {}


@dataclass(frozen=True, slots=True)
class Whole(Record):
    """The whole contents of a store, with which a segment begins."""

    op = "store"
    contents: Contents

    def apply(self, contents: Contents) -> None:
        """Replace the contents."""
        contents.entries = dict(self.contents.entries)
        contents.dependents = {name: set(by) for name, by in self.contents.dependents.items()}
        contents.tokens = set(self.contents.tokens)
        contents.meta = self.contents.meta
        contents.unsettled = self.contents.unsettled
        contents.last_token = self.contents.last_token

    def members(self) -> dict[str, Any]:
        """Return the contents."""
        return {
            "entries": [_members_of(entry) for entry in self.contents.entries.values()],
            "meta": self.contents.meta,
            "unsettled": sorted(self.contents.unsettled),
            "last_token": self.contents.last_token,
        }


@dataclass(frozen=True, slots=True)
class Add(Record):
    """New entries; their files are preserved after the record is written."""

    op = "add"
    entries: tuple[Entry, ...]

    def apply(self, contents: Contents) -> None:
        """Append the entries."""
        contents.add(self.entries)
        contents.unsettled = frozenset(entry.name for entry in self.entries)

    def members(self) -> dict[str, Any]:
        """Return the entries."""
        return {"entries": [_members_of(entry) for entry in self.entries]}


@dataclass(frozen=True, slots=True)
class Remove(Record):
    """Entries that are gone."""

    op = "remove"
    names: tuple[str, ...]

    def apply(self, contents: Contents) -> None:
        """Remove the entries."""
        contents.remove(self.names)
        contents.unsettled = frozenset()

    def members(self) -> dict[str, Any]:
        """Return the names."""
        return {"names": list(self.names)}


@dataclass(frozen=True, slots=True)
class Meta(Record):
    """New metadata of the store, or of the entry `name`."""

    op = "meta"
    name: str | None
    meta: dict[str, Any]

    def apply(self, contents: Contents) -> None:
        """Replace the metadata."""
        if self.name is None:
            contents.meta = self.meta
        else:
            contents.entries[self.name] = replace(contents.entries[self.name], meta=self.meta)
        contents.unsettled = frozenset()

    def members(self) -> dict[str, Any]:
        """Return the metadata and the name."""
        return {"name": self.name, "meta": self.meta}


@dataclass(frozen=True, slots=True)
class Settle(Record):
    """All files of the entries before this record are preserved."""

    op = "settle"

    def apply(self, contents: Contents) -> None:
        """Note that all files are preserved."""
        contents.unsettled = frozenset()


def _members_of(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "tokens": entry.tokens,
        "sizes": entry.sizes,
        "kind": entry.kind,
        "requires": entry.requires,
        "meta": entry.meta,
        "state": entry.state,
    }


def encode_header() -> bytes:
    """Return the header of an empty segment."""
    check = zlib.crc32(HEADER.pack(MAGIC, VERSION, 0, 1, 0))
    header = HEADER.pack(MAGIC, VERSION, check, 1, 0)
    return header + struct.pack("<QQ", 0, RECORDS_OFFSET) + bytes(RECORDS_OFFSET - END_OFFSET - 8)


def encode_record(record: Record, number: int) -> bytes:
    """Return the bytes of a record, padded to a multiple of 8 bytes."""
    tree = {"op": record.op, **record.members()}
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    rest = _RECORD.pack(0, len(text), number)[4:] + text
    return struct.pack("<I", zlib.crc32(rest)) + rest + bytes(-len(text) % 8)


def decode_segment(read: Callable[[int, int], bytes], size: int) -> tuple[Contents, int]:
    """Return the contents that the records of a segment make up, and the number of the last one.

    Everything is checked, because another program may have written records with valid checksums.

    Args:
        read: a function of a length and an offset, both in bytes, that reads from the segment.
        size: the size of the segment in bytes.

    Raises:
        StoreError: the segment is damaged (EBADMSG).
    """
    end = int.from_bytes(read(8, END_OFFSET), "little")
    if not RECORDS_OFFSET < end <= size or end % 8:
        raise damage_error(f"its end is at {end} of {size} bytes")
    data = read(end, 0)
    contents, offset, expected = Contents(), RECORDS_OFFSET, -1
    while offset < end:
        text, number, following = _read_record(data, offset)
        if expected not in (-1, number):
            raise damage_error(f"record {number} comes where {expected} was expected")
        try:
            _apply_checked(_parse(_load(text)), contents, first=expected == -1)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damage_error(f"record {number}: {type(error).__name__}: {error}") from None
        offset, expected = following, number + 1
    return contents, expected - 1


def _read_record(data: bytes, offset: int) -> tuple[bytes, int, int]:
    """Return the JSON and the number of a record, and the offset of the next record."""
    start = offset + _RECORD.size
    if start > len(data):
        raise damage_error(f"the record at {offset} is cut")
    check, length, number = _RECORD.unpack_from(data, offset)
    if length > len(data) - start:
        raise damage_error(f"the record at {offset} is cut")
    text = data[start : start + length]
    if check != zlib.crc32(text, zlib.crc32(data[offset + 4 : start])):
        raise damage_error(f"the checksum of the record at {offset} is wrong")
    return text, number, start + length + -length % 8


def _apply_checked(record: Record, contents: Contents, *, first: bool) -> None:
    """Apply a record; raise ValueError, KeyError or TypeError if it cannot be right."""
    if first != isinstance(record, Whole):
        raise ValueError(f"{record.op!r} is not how a segment begins, or goes on")
    if isinstance(record, Add):
        contents.check_addition(record.entries)
    elif isinstance(record, Remove):
        contents.check_removal(record.names)
    record.apply(contents)


def _parse(tree: Any) -> Record:
    """Return the record in parsed JSON; raise ValueError, KeyError or TypeError if invalid."""
    match tree["op"]:
        case "store":
            entries = [_parse_entry(item) for item in _check_list(tree["entries"])]
            Contents().check_addition(entries)
            unsettled = [check_name(name) for name in _check_list(tree["unsettled"])]
            if unknown := set(unsettled) - {entry.name for entry in entries}:
                raise ValueError(f"{unknown} are unsettled, but no entries")
            last_token = tree["last_token"] and check_token(tree["last_token"])
            meta = check_metadata(tree["meta"])
            return Whole(Contents(entries, meta, unsettled, last_token))
        case "add":
            return Add(tuple(_parse_entry(item) for item in _check_list(tree["entries"])))
        case "remove":
            return Remove(tuple(check_name(name) for name in _check_list(tree["names"])))
        case "meta":
            name = None if tree["name"] is None else check_name(tree["name"])
            return Meta(name, check_metadata(tree["meta"]))
        case "settle":
            return Settle()
        case unknown:
            raise ValueError(f"{unknown!r} is no operation")


def _parse_entry(item: Any) -> Entry:
    tokens = tuple(check_token(token) for token in _check_list(item["tokens"]))
    sizes = tuple(_check_list(item["sizes"]))
    if len(tokens) != len(sizes) or not tokens or not all(map(_is_size, sizes)):
        raise TypeError(f"{item['name']!r} has not one size for each of its files")
    return Entry(
        name=check_name(item["name"]),
        tokens=tokens,
        sizes=sizes,
        kind=check_name(item["kind"]),
        requires=tuple(check_name(name) for name in _check_list(item["requires"])),
        meta=check_metadata(item["meta"]),
        state=check_metadata(item["state"]),
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _load(text: bytes) -> Any:
    """Parse JSON; raise ValueError if it is not valid, or has a number that is not finite."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid in JSON")


def _check_list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def check_name(value: Any) -> str:
    """Return a name; raise TypeError if it is not one."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a name")
    return value


def check_token(value: Any) -> int:
    """Return the token of an entry's file; raise TypeError if it is not one."""
    if type(value) is not int or value not in _ENTRY_TOKENS:
        raise TypeError(f"{value!r} is not a token of an entry")
    return value


def check_metadata(value: Any) -> dict[str, Any]:
    """Return metadata; raise TypeError if it is not a JSON object."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not metadata")
    return value


def damage_error(problem: str) -> StoreError:
    """Return the exception for a table that is damaged (EBADMSG)."""
    return StoreError(
        errno.EBADMSG,
        "read table",
        problem,
        "The session is unchanged; its files can be retrieved by their tokens",
    )
