"""`Journal`: the table of a store, which the store writes into its session record by record."""

from __future__ import annotations

import errno
import zlib
from typing import TYPE_CHECKING

from pyluo._sys import Exported
from pyluo.errors import RequestError, StoreError, TokenInUseError, TokenNotFoundError
from pyluo.memfd import Memfd
from pyluo.stores import version_2
from pyluo.stores.entry import FIRST_TABLE_TOKEN, Contents
from pyluo.stores.records import (
    CURRENT_OFFSET,
    END_OFFSET,
    HEADER,
    MAGIC,
    RECORDS_OFFSET,
    VERSION,
    Record,
    Whole,
    damage_error,
    decode_segment,
    encode_header,
    encode_record,
)

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Mapping

    from pyluo.session import OutgoingSession

__all__ = ["TABLE_ROOM", "TABLE_TOKEN", "Journal", "is_of_table", "read_contents"]

TABLE_TOKEN = 0
TABLE_ROOM = 1 << 20
"""Bytes that a memory cgroup must have room for before a table is retrieved, which are enough for
any table but one of thousands of entries.
"""
_SEGMENT_SIZE = 1 << 16  # bytes; later segments have twice the size of the contents, or more
_WORD = 64  # bits


def is_of_table(token: int) -> bool:
    """Return whether a token is that of a segment, and not of an entry's file."""
    return token == TABLE_TOKEN or token >= FIRST_TABLE_TOKEN


class Journal:
    """The table of an outgoing store, in memfds that the store's session preserves.

    Every method can be interrupted anywhere, and the same call again completes it.

    Args:
        name: the name of the store.
        keep: a function that has the keeper keep the files of the table; it is called before a new
            segment is used.

    Attributes:
        contents: the contents of the store, as the table has them.
    """

    def __init__(self, name: str, keep: Callable[[], None]) -> None:
        self.contents: Contents = Contents()
        self._keep = keep
        self._name = name
        self._segments: dict[int, _Segment] = {}
        self._preserved: set[int] = set()  # tokens of segments
        self._attempted: set[int] = set()  # likewise; whether they are preserved may be unknown
        self._writing: tuple[_Segment, Record, int, int] | None = None
        self._last: Record | None = None
        self._number = 0  # of the last record
        # What the first segment may say: the segment in use and its end, before and after the
        # last change.
        self._positions: tuple[tuple[int, int], ...] = ()

    @property
    def memfds(self) -> dict[int, Memfd]:
        """The files of the table by their tokens in the session."""
        return {token: segment.memfd for token, segment in self._segments.items()}

    @classmethod
    def resume(cls, name: str, keep: Callable[[], None], memfds: Mapping[int, Memfd]) -> Journal:
        """Return the journal in the memfds of another `Journal`; take the memfds over.

        Raises:
            StoreError: the table is damaged (EBADMSG).
        """
        journal = cls(name, keep)
        for token, memfd in memfds.items():
            journal._segments[token] = _Segment(memfd)
            journal._attempted.add(token)
        if TABLE_TOKEN not in memfds or journal._segments[TABLE_TOKEN].current not in memfds:
            raise damage_error("a segment of it is missing")
        segment = journal._current()
        journal._preserved |= {TABLE_TOKEN, journal._segments[TABLE_TOKEN].current}
        journal._positions = (journal._position(),)
        journal.contents, journal._number = decode_segment(segment.memfd.read, segment.memfd.size)
        return journal

    def begin(self, session: OutgoingSession) -> None:
        """Write an empty table and preserve it.

        Raises:
            TokenInUseError: the session has a file with token 0 already (EEXIST).
            RequestError: see `OutgoingSession.preserve`.
        """
        if TABLE_TOKEN not in self._segments:
            segment = _Segment.create(self._name, _SEGMENT_SIZE)
            segment.begin(encode_record(Whole(self.contents), self._number))
            self._segments[TABLE_TOKEN] = segment
        if not self._positions:
            self._positions = (self._position(),)
        self._preserve(session, TABLE_TOKEN)

    def _preserve(self, session: OutgoingSession, token: int) -> None:
        """Preserve a segment, unless it is preserved."""
        if token in self._preserved:
            return
        interrupted = token in self._attempted
        self._attempted.add(token)
        try:
            session.preserve(self._segments[token].memfd, token)
        except TokenInUseError:
            if not interrupted:  # otherwise the interrupted call has preserved it
                self._attempted.discard(token)
                raise
        except RequestError:
            self._attempted.discard(token)
            raise
        self._preserved.add(token)

    def append(self, session: OutgoingSession, record: Record) -> None:
        """Write a record into the table, and apply it to `contents`.

        Appending a record object that was appended already does nothing.

        Args:
            session: the session of the store, which preserves new segments of the table.
            record: the record.

        Raises:
            StoreError: another process took the store over, and changed it (ESTALE).
            RequestError: the segment is full, and the next one could not be preserved; see
                `OutgoingSession.preserve`. The table is unchanged.
        """
        self.catch_up()
        if record is self._last:
            return
        self._refuse_foreign_changes()
        number = self._number + 1
        data = encode_record(record, number)
        segment = self._current()
        if segment.end + len(data) > segment.size:
            segment = self._switch(session, len(data))
        before = self._position()
        self._positions = before, (before[0], before[1] + len(data))
        self._writing = segment, record, number, segment.end
        segment.append(data)
        self.catch_up()

    def catch_up(self) -> None:
        """Apply the record that an interrupted `append` wrote, if it is in the table."""
        if self._writing is None:
            return
        segment, record, number, end = self._writing
        if segment.end != end:
            record.apply(self.contents)
            self._number = number
            self._last = record
        self._writing = None

    def _position(self) -> tuple[int, int]:
        """Return the token of the segment in use, and its end."""
        return self._segments[TABLE_TOKEN].current, self._current().end

    def _refuse_foreign_changes(self) -> None:
        if self._position() not in self._positions:
            raise StoreError(
                errno.ESTALE,
                "write table",
                f"of store {self._name!r}",
                "Another object or process took the store over with OutgoingStore.open(), and "
                "changed it: open() it again",
            )

    def _current(self) -> _Segment:
        """Return the segment in use. Only the first segment knows it, and never a variable here."""
        return self._segments[self._segments[TABLE_TOKEN].current]

    def _switch(self, session: OutgoingSession, room: int) -> _Segment:
        """Write the whole contents into another segment, and use that one.

        The segment that was in use is kept for a later switch, because the session cannot give a
        single file back.

        Args:
            session: the session of the store.
            room: the room that the segment must have behind the contents, in bytes.
        """
        whole = encode_record(Whole(self.contents), self._number)
        token = self._find_spare(RECORDS_OFFSET + 2 * (len(whole) + room))
        self._preserve(session, token)
        self._keep()
        segment = self._segments[token]
        segment.begin(whole)
        self._positions = self._position(), (token, segment.end)
        self._segments[TABLE_TOKEN].current = token
        return segment

    def _find_spare(self, size: int) -> int:
        """Return the token of a segment that is not in use and has `size` bytes; create one if
        there is none.
        """
        in_use = self._segments[TABLE_TOKEN].current
        for token, segment in self._segments.items():
            if token != in_use and segment.size >= size:
                return token
        # Twice as large as all others: then all of them together take not much more memory.
        size = max(size, 2 * max(segment.size for segment in self._segments.values()))
        token = max(FIRST_TABLE_TOKEN, *(token + 1 for token in self._segments))
        self._segments[token] = _Segment.create(self._name, 1 << (size - 1).bit_length())
        return token

    def close(self) -> None:
        """Close the descriptors of the table; the session still has its files."""
        for segment in self._segments.values():
            segment.close()


class _Segment:
    """A file of the table, mapped into memory."""

    def __init__(self, memfd: Memfd) -> None:
        self.memfd = memfd
        self.size = memfd.size
        self._mapping: mmap.mmap = memfd.map()
        self._words = Exported(self._mapping)

    @classmethod
    def create(cls, name: str, size: int) -> _Segment:
        """Create a segment with a header, for the store of this name."""
        segment = cls(Memfd.create(f"pyluo table of {name}"[:60], size))
        segment._mapping[:RECORDS_OFFSET] = encode_header()
        return segment

    @property
    def end(self) -> int:
        """The offset of the first byte after the last record."""
        return self._words.load(END_OFFSET, _WORD)

    @end.setter
    def end(self, value: int) -> None:
        self._words.store(END_OFFSET, _WORD, value)

    @property
    def current(self) -> int:
        """The token of the segment in use, in the first segment."""
        return self._words.load(CURRENT_OFFSET, _WORD)

    @current.setter
    def current(self, token: int) -> None:
        self._words.store(CURRENT_OFFSET, _WORD, token)

    def begin(self, data: bytes) -> None:
        """Write the first record, for a segment that is not in use."""
        self._mapping[RECORDS_OFFSET : RECORDS_OFFSET + len(data)] = data
        self.end = RECORDS_OFFSET + len(data)

    def append(self, data: bytes) -> None:
        """Write a record behind the last one; it does not count before `end` is set."""
        end = self.end
        self._mapping[end : end + len(data)] = data
        self.end = end + len(data)

    def close(self) -> None:
        """Close the mapping and the memfd."""
        self._words.release()
        self._mapping.close()
        self.memfd.close()


def read_contents(retrieve: Callable[[int], Memfd]) -> Contents:
    """Return the contents of a store, from the table in its session.

    Args:
        retrieve: a function that returns a descriptor of the file with a token.

    Raises:
        StoreError: the table is damaged (EBADMSG), or newer than this pyluo (EPROTONOSUPPORT).
        TokenNotFoundError: the session has no file with token 0 (ENOENT).
    """
    with retrieve(TABLE_TOKEN) as first:
        version = _read_version(first)
        if version < VERSION:
            return version_2.decode(first.read, first.size)
        if version > VERSION:
            raise StoreError(
                errno.EPROTONOSUPPORT,
                "read table",
                f"version {version}, where this pyluo reads up to {VERSION}",
                "Use the pyluo that wrote it, or a newer one; nothing was changed",
            )
        current = int.from_bytes(first.read(8, CURRENT_OFFSET), "little")
        if current == TABLE_TOKEN:
            return decode_segment(first.read, first.size)[0]
    if current < FIRST_TABLE_TOKEN:
        raise damage_error(f"token {current} is no token of a table")
    try:
        segment = retrieve(current)
    except TokenNotFoundError:
        raise damage_error(f"the segment with token {current} is missing") from None
    with segment:
        if _read_version(segment) != VERSION:
            raise damage_error(f"the header of the segment with token {current}")
        return decode_segment(segment.read, segment.size)[0]


def _read_version(memfd: Memfd) -> int:
    """Return the version in a header; 0 if the header is not valid by itself.

    The checksum of versions 1 and 2 is that of the header and of the JSON after it, so that their
    headers need not be valid by themselves.
    """
    header = memfd.read(HEADER.size, 0)
    if len(header) < HEADER.size:
        return 0
    magic, version, check, generation, length = HEADER.unpack(header)
    valid = not length and check == zlib.crc32(HEADER.pack(magic, version, 0, generation, 0))
    return int(version) if magic == MAGIC and valid else 0
