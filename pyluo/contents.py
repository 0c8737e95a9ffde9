"""The encoding of the table of contents of an `FdStore`, which keeps named files in a session.

The table lists the entries of the store with their tokens. It is a file with two slots. Each write
goes to the slot that does not hold the newest table, so that the previous table stays readable if
the jump interrupts the write. A slot is a header followed by JSON. The layout of the header is the
same in all versions::

    bytes 0-7    magic
    bytes 8-11   version of the JSON
    bytes 12-15  CRC-32 of the header, with zero in this field, and of the JSON
    bytes 16-23  generation: of two valid slots, the one with the higher generation is used
    bytes 24-31  length of the JSON, in bytes

All numbers are little-endian. In version 1 an entry had a name, a token and metadata. Version 2
added to each entry the names of the entries that it requires, the kind and size of its file, and
whether the file is preserved.
"""

from __future__ import annotations

import errno
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyluo.errors import FdStoreError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["VERSION", "Contents", "Entry", "decode", "encode"]

VERSION = 2
_MAGIC = b"pyluoFDS"
_HEADER = struct.Struct("<8sIIQQ")
_TOKENS = range(1, 1 << 64)  # 0 is the token of the table itself
_MAX_JSON = 64 << 20  # bytes; a header with a greater length is not valid
_OPERATION = "FdStore table"


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a store: a file with a name.

    Attributes:
        name: the entry's name in the store.
        token: the file's token in the session; entries are not sorted by their tokens.
        kind: "memfd", or "file" if the file has no class of its own.
        size: the file's size in bytes when the entry was added; 0 if the file has no size.
        requires: the names of earlier entries that this entry needs.
        meta: metadata from the owner of the store: any value that JSON can represent.
        preserved: whether the file is in the session; False while it is being preserved.
    """

    name: str
    token: int
    kind: str = "file"
    size: int = 0
    requires: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    preserved: bool = True


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a table.

    Attributes:
        entries: the entries in order; an entry comes after the entries that it requires.
        meta: the metadata of the store.
    """

    entries: tuple[Entry, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def encode(contents: Contents, generation: int, room: int) -> bytes:
    """Return the bytes of a slot with these contents, at most `room` bytes.

    Raises:
        FdStoreError: the slot would be longer (ENOSPC).
        TypeError: JSON cannot represent the metadata, or a name is empty or not a string.
        ValueError: JSON cannot represent the metadata, for example NaN.
    """
    tree = {
        "meta": contents.meta,
        "entries": [
            {
                "name": entry.name,
                "token": entry.token,
                "kind": entry.kind,
                "size": entry.size,
                "requires": list(entry.requires),
                "meta": entry.meta,
                # 0 or 1, and not false or true, so that the JSON has the same length for both: a
                # table that fits before a file is preserved fits afterwards.
                "settled": int(entry.preserved),
            }
            for entry in contents.entries
        ],
    }
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    _parse_contents(json.loads(text), VERSION)  # refuse contents that no reader could parse later
    room = min(room, _HEADER.size + _MAX_JSON)
    if _HEADER.size + len(text) > room:
        raise FdStoreError(
            errno.ENOSPC,
            _OPERATION,
            f"{_HEADER.size + len(text)} bytes where there is room for {room}",
            "Create the store with a larger table_size, or keep less metadata",
        )
    check = _checksum(VERSION, generation, text)
    return _HEADER.pack(_MAGIC, VERSION, check, generation, len(text)) + text


def decode(read: Callable[[int, int], bytes], size: int) -> tuple[Contents, int, int]:
    """Decode the newest table in a file.

    No more is read than a table can occupy, because the file may be large and no table at all, such
    as the RAM of a guest.

    Args:
        read: a function of a length and an offset, both in bytes, that reads from the file.
        size: the size of the file in bytes.

    Returns:
        The contents, their generation, and the number of the slot that they were in (0 or 1).

    Raises:
        FdStoreError: the table has a newer version (EPROTONOSUPPORT); or the file has no valid
            table (EBADMSG).
    """
    room = size // 2
    slots = [_read_slot(read, number * room, room) for number in (0, 1)]
    found = [(slot, number) for number, slot in enumerate(slots) if slot is not None]
    if not found:
        raise _damage_error("neither of its two slots is valid")
    (version, generation, text), number = max(found, key=lambda item: item[0][1])
    if version > VERSION:
        raise FdStoreError(
            errno.EPROTONOSUPPORT,
            _OPERATION,
            f"version {version}, where this pyluo reads up to {VERSION}",
            "Use the pyluo that wrote it, or a newer one; nothing was changed",
        )
    try:
        tree = json.loads(text)
        return _parse_contents(tree, version), generation, number
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damage_error(f"it cannot be understood: {type(error).__name__}: {error}") from None


def _read_slot(
    read: Callable[[int, int], bytes], offset: int, room: int
) -> tuple[int, int, bytes] | None:
    """Return the version, generation and JSON of a slot; None if the slot is empty or damaged."""
    header = read(_HEADER.size, offset)
    if room < _HEADER.size or len(header) < _HEADER.size:
        return None
    magic, version, check, generation, length = _HEADER.unpack(header)
    if magic != _MAGIC or not version or length > min(room - _HEADER.size, _MAX_JSON):
        return None
    text = read(length, offset + _HEADER.size)
    return (version, generation, text) if check == _checksum(version, generation, text) else None


def _checksum(version: int, generation: int, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(_HEADER.pack(_MAGIC, version, 0, generation, len(text))))


def _parse_contents(tree: Any, version: int) -> Contents:
    """Return the contents in parsed JSON; raise ValueError, KeyError or TypeError if invalid.

    Everything is checked, because another program may have written a table with a valid checksum.
    """
    entries: dict[str, Entry] = {}
    tokens: set[int] = set()
    for item in tree["entries"]:
        entry = _parse_entry_v1(item) if version == 1 else _parse_entry(item)
        if entry.name in entries or entry.token in tokens:
            raise ValueError(f"{entry.name!r}, token {entry.token}: used twice")
        if unknown := set(entry.requires) - entries.keys():
            raise ValueError(f"{entry.name!r} requires {unknown}, which do not come before it")
        entries[entry.name] = entry
        tokens.add(entry.token)
    return Contents(tuple(entries.values()), _check_metadata(tree.get("meta", {})))


def _parse_entry_v1(item: Any) -> Entry:
    return Entry(
        _check_name(item["name"]),
        _check_token(item["token"]),
        meta=_check_metadata(item.get("meta", {})),
    )


def _parse_entry(item: Any) -> Entry:
    settled, requires, size = item["settled"], item["requires"], item["size"]
    valid = type(settled) is int and type(size) is int and isinstance(requires, list)
    if not valid or settled not in (0, 1):
        raise TypeError("an entry has fields of other types")
    return Entry(
        name=_check_name(item["name"]),
        token=_check_token(item["token"]),
        kind=_check_name(item["kind"]),
        size=size,
        requires=tuple(_check_name(name) for name in requires),
        meta=_check_metadata(item["meta"]),
        preserved=bool(settled),
    )


def _check_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a name")
    return value


def _check_token(value: Any) -> int:
    if type(value) is not int or value not in _TOKENS:
        raise TypeError(f"{value!r} is not a token of an entry")
    return value


def _check_metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not metadata")
    return value


def _damage_error(problem: str) -> FdStoreError:
    return FdStoreError(
        errno.EBADMSG,
        _OPERATION,
        problem,
        "The session is unchanged; its files can be retrieved by their tokens",
    )
