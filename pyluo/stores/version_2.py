"""Tables of versions 1 and 2, which pyluo reads and never writes: see store-format.md."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

from pyluo.stores.entry import Contents, Entry
from pyluo.stores.records import (
    HEADER,
    MAGIC,
    check_metadata,
    check_name,
    check_token,
    damage_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["decode"]

_VERSIONS = (1, 2)
_MAX_JSON = 64 << 20  # bytes; a header with a greater length is not valid


def decode(read: Callable[[int, int], bytes], size: int) -> Contents:
    """Return the contents of the newest table in a file.

    No more is read than a table can occupy, because the file may be large and no table at all, such
    as the RAM of a guest.

    Args:
        read: a function of a length and an offset, both in bytes, that reads from the file.
        size: the size of the file in bytes.

    Raises:
        StoreError: the file has no valid table (EBADMSG).
    """
    room = size // 2
    slots = [_read_slot(read, number * room, room) for number in (0, 1)]
    found = [slot for slot in slots if slot is not None]
    if not found:
        raise damage_error("neither of its two slots is valid")
    _, version, text = max(found)
    try:
        return _parse_contents(json.loads(text), version)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damage_error(f"{type(error).__name__}: {error}") from None


def _read_slot(
    read: Callable[[int, int], bytes], offset: int, room: int
) -> tuple[int, int, bytes] | None:
    """Return the generation, version and JSON of a slot; None if the slot is empty or damaged."""
    header = read(HEADER.size, offset)
    if room < HEADER.size or len(header) < HEADER.size:
        return None
    magic, version, check, generation, length = HEADER.unpack(header)
    if magic != MAGIC or version not in _VERSIONS or length > min(room - HEADER.size, _MAX_JSON):
        return None
    text = read(length, offset + HEADER.size)
    unchecked = HEADER.pack(MAGIC, version, 0, generation, length)
    valid = check == zlib.crc32(text, zlib.crc32(unchecked))
    return (generation, version, text) if valid else None


def _parse_contents(tree: Any, version: int) -> Contents:
    """Return the contents in parsed JSON; raise ValueError, KeyError or TypeError if invalid."""
    contents = Contents(meta=check_metadata(tree.get("meta", {})))
    unsettled: set[str] = set()
    for item in tree["entries"]:
        entry = _parse_entry_v1(item) if version == 1 else _parse_entry(item)
        contents.check_addition([entry])
        if version == 2 and not _check_number(item["settled"], 1):
            unsettled.add(entry.name)
        contents.add([entry])
    contents.unsettled = frozenset(unsettled)
    return contents


def _parse_entry_v1(item: Any) -> Entry:
    return Entry(
        check_name(item["name"]),
        (check_token(item["token"]),),
        (0,),
        meta=check_metadata(item.get("meta", {})),
    )


def _parse_entry(item: Any) -> Entry:
    if not isinstance(item["requires"], list):
        raise TypeError(f"{item['requires']!r} is not a list")
    return Entry(
        name=check_name(item["name"]),
        tokens=(check_token(item["token"]),),
        sizes=(_check_number(item["size"], 1 << 63),),
        kind=check_name(item["kind"]),
        requires=tuple(check_name(name) for name in item["requires"]),
        meta=check_metadata(item["meta"]),
    )


def _check_number(value: Any, last: int) -> int:
    if type(value) is not int or not 0 <= value <= last:
        raise TypeError(f"{value!r} is not a number up to {last}")
    return value
