"""The table of contents of a descriptor store, as bytes: what is in it, and under which token.

A file of two slots. A write goes to the slot that does not hold the newest table, so that one torn
by the jump leaves the table before it readable. Each slot is a header, whose layout is the same
for all versions, and JSON::

    bytes 0-7    magic
    bytes 8-11   version of the JSON
    bytes 12-15  CRC-32 of the header without this field, and of the JSON
    bytes 16-23  generation: the newest valid slot counts
    bytes 24-31  length of the JSON, in bytes

All numbers are little-endian. Version 1 had names, tokens and metadata; version 2 added the
prerequisites, the kind and size of the file, and whether it is in yet.
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
_TOKENS = range(1, 1 << 64)  # 0 is the table's own
_MAX_JSON = 64 << 20  # bytes of JSON; a header that says more is no table's
_READING = "FdStore table"


@dataclass(frozen=True, slots=True)
class Entry:
    """One descriptor of a store.

    Attributes:
        name: by which the store knows it.
        token: by which the session does; the order of the entries is apart from it.
        kind: "memfd", or "file" for what has no class of its own.
        size: in bytes, when it was added; 0 where that says nothing.
        requires: names of entries before this one that it needs.
        meta: what the owner of the store wants to remember of it: whatever JSON carries.
        preserved: whether the session has it; False from the intention to preserve it until it is in.
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
    """Everything that a table says.

    Attributes:
        entries: in their order; prerequisites come before what needs them.
        meta: of the store as a whole.
    """

    entries: tuple[Entry, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def encode(contents: Contents, generation: int, room: int) -> bytes:
    """One slot, at most `room` bytes.

    Raises:
        FdStoreError: ENOSPC, it does not fit.
        TypeError: the metadata is not what JSON carries, or a name is none.
        ValueError: likewise, or a number that is none.
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
                "settled": int(entry.preserved),  # as long either way
            }
            for entry in contents.entries
        ],
    }
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    _parse_contents(json.loads(text), VERSION)  # or nobody could read it after the jump
    room = min(room, _HEADER.size + _MAX_JSON)
    if _HEADER.size + len(text) > room:
        raise FdStoreError(
            errno.ENOSPC,
            _READING,
            f"{_HEADER.size + len(text)} bytes where {room} are kept for it",
            "Create the store with a larger table_size, or keep less metadata",
        )
    check = _checksum(VERSION, generation, text)
    return _HEADER.pack(_MAGIC, VERSION, check, generation, len(text)) + text


def decode(read: Callable[[int, int], bytes], size: int) -> tuple[Contents, int, int]:
    """What the newest table in a file says, with its generation and the number of its slot.

    No more of the file is read than a table takes: it may be a guest's RAM.

    Args:
        read: gives so many bytes, from that offset.
        size: of the file, in bytes.

    Raises:
        FdStoreError: EPROTONOSUPPORT, the table is of a newer version; EBADMSG, it is damaged, or
            no table.
    """
    room = size // 2
    slots = [_read_slot(read, number * room, room) for number in (0, 1)]
    found = [(slot, number) for number, slot in enumerate(slots) if slot is not None]
    if not found:
        raise _damage_error("neither of its copies is whole")
    (version, generation, text), number = max(found, key=lambda item: item[0][1])
    if version > VERSION:
        raise FdStoreError(
            errno.EPROTONOSUPPORT,
            _READING,
            f"version {version}, where this pyluo reads up to {VERSION}",
            "Use the pyluo that wrote it, or a newer one; nothing was touched",
        )
    try:
        tree = json.loads(text)
        return _parse_contents(tree, version), generation, number
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damage_error(f"it cannot be understood: {type(error).__name__}: {error}") from None


def _read_slot(
    read: Callable[[int, int], bytes], offset: int, room: int
) -> tuple[int, int, bytes] | None:
    """The version, the generation and the JSON of a slot; None for an empty or a torn one."""
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
    """Checks everything: a table that is whole may still be another program's."""
    entries: dict[str, Entry] = {}
    tokens: set[int] = set()
    for item in tree["entries"]:
        entry = _parse_entry_v1(item) if version == 1 else _parse_entry(item)
        if entry.name in entries or entry.token in tokens:
            raise ValueError(f"{entry.name!r}, token {entry.token}: not the only one")
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
    whole = type(settled) is int and type(size) is int and isinstance(requires, list)
    if not whole or settled not in (0, 1):
        raise TypeError("an entry with fields of other types")
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
        raise TypeError(f"{value!r} is no name")
    return value


def _check_token(value: Any) -> int:
    if type(value) is not int or value not in _TOKENS:
        raise TypeError(f"{value!r} is no token of an entry")
    return value


def _check_metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no metadata")
    return value


def _damage_error(how: str) -> FdStoreError:
    return FdStoreError(
        errno.EBADMSG,
        _READING,
        how,
        "What the session holds is untouched; its files can be retrieved by their tokens",
    )
