"""`FdStore`: a session whose files have names, an order and metadata.

A store can go through any number of live updates. It keeps its table of contents in the session
itself, in a memfd with token 0. The jump may come at any moment and finds a valid table: an entry
is written to the table before its file is preserved, and marked as preserved afterwards.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from pyluo import contents, guards
from pyluo._sys import raising
from pyluo.contents import Contents, Entry
from pyluo.descriptor import OwnedFd, fileno_of, wrap_new_fd
from pyluo.errors import (
    FdStoreError,
    LuoError,
    SessionExistsError,
    TokenInUseError,
    TokenNotFoundError,
)
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd, supports_seals
from pyluo.open_sessions import open_sessions
from pyluo.session import IncomingSession, OutgoingSession

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

__all__ = ["FdStore"]

_TABLE_TOKEN = 0
_TABLE_SIZE = 1 << 16
_RECREATE_TIMEOUT = 2.0  # seconds
_TYPES: dict[str, type[OwnedFd]] = {"memfd": Memfd}

F = TypeVar("F", bound=OwnedFd)


class FdStore:
    """Named files that go through live updates together.

    Before the jump, `create` returns an outgoing store, to which entries are added. After the jump,
    `retrieve` returns an incoming store with the same entries: `get` returns their files, and then
    either `finish` ends the store or `renew` makes it outgoing again, for the next jump. The store
    has descriptors of its own; the caller owns the descriptors that it passes to the store and that
    it gets from the store.

    When the ``with`` block of a store ends normally, an incoming store is finished. When an
    exception leaves the block, a store from `create` is discarded, and a store from `retrieve` is
    left as it is, even if it was renewed. Several threads can use a store; a lock lets one of them
    in at a time.

    Args:
        session: an outgoing session that has no file with token 0, or an incoming session that was
            a store in the previous kernel.
        table_size: the size of a table of contents in bytes; there is room for two of them. Each
            entry takes about 120 bytes, plus its metadata as JSON.

    Raises:
        FdStoreError: the table of an incoming session is damaged (EBADMSG), newer than this pyluo
            (EPROTONOSUPPORT) or missing (ENOENT). Nothing is finished; the attribute `session` of
            the exception is the open session.
        TokenInUseError: the outgoing session has a file with token 0 (EEXIST).
    """

    def __init__(
        self, session: OutgoingSession | IncomingSession, *, table_size: int = _TABLE_SIZE
    ) -> None:
        self._files: dict[str, OwnedFd] = {}
        self._table: _Table | None = None
        self._lock = threading.RLock()
        self._session = session
        self._created = isinstance(session, OutgoingSession)
        self._name = session.name
        self._entries: dict[str, Entry] = {}
        self._meta: dict[str, Any] = {}
        self._retrieved: set[str] = set()  # names of entries; retrieving these again cannot fail
        self._handed_out: set[str] = set()  # names of entries whose files get() has returned
        self._lost: tuple[str, ...] = ()
        self._finishing = False
        if isinstance(session, IncomingSession):
            try:
                self._read_table(session)
            except LuoError as error:
                raise self._table_error(error, session) from error
        else:
            self._table = _new_table(session, self._contents(), table_size)

    @classmethod
    def create(
        cls, name: str, *, device: LiveUpdate | None = None, table_size: int = _TABLE_SIZE
    ) -> Self:
        """Create an empty store in a new session, for the next live update.

        Args:
            name: the name of the session.
            device: the open device; by default the call opens and closes the device itself.
            table_size: see the class.

        Raises:
            LuoError: see `LiveUpdate` and `LiveUpdate.create_session`.
        """
        with _open_device(device) as luo:
            session = luo.create_session(name)
        try:
            return cls(session, table_size=table_size)
        except BaseException:
            session.discard()
            raise

    @classmethod
    def retrieve(cls, name: str, *, device: LiveUpdate | None = None) -> Self:
        """Retrieve the store of this name that the previous kernel handed over.

        Raises:
            LuoError: see `LiveUpdate` and `LiveUpdate.retrieve_session`.
            FdStoreError: see the class.
        """
        with _open_device(device) as luo:
            session = luo.retrieve_session(name)
        return cls(session)

    @property
    def name(self) -> str:
        """The name of the store's session."""
        return self._name

    @property
    def session(self) -> OutgoingSession | IncomingSession:
        """The session that the store uses now; `renew` and `remove` replace it by a new session."""
        return self._session

    @property
    def outgoing(self) -> OutgoingSession:
        """The session of an outgoing store.

        Raises:
            FdStoreError: the store is incoming (EPERM).
        """
        return self._require_outgoing("outgoing")

    @property
    def incoming(self) -> bool:
        """Whether the store came from the previous kernel and was not renewed."""
        return isinstance(self._session, IncomingSession)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries of the store, in order."""
        with self._lock:
            return tuple(self._entries.values())

    @property
    def meta(self) -> dict[str, Any]:
        """A copy of the store's metadata; `set_meta` changes it."""
        with self._lock:
            return dict(self._meta)

    @property
    def lost(self) -> tuple[str, ...]:
        """The names of the entries that are missing because the jump interrupted adding them."""
        return self._lost

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter([entry.name for entry in self.entries])

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> OwnedFd:
        return self.get(name)

    @overload
    def get(self, name: str) -> OwnedFd: ...

    @overload
    def get(self, name: str, type: type[F]) -> F: ...

    def get(
        self,
        name: str,
        type: type[OwnedFd] | None = None,  # noqa: A002
    ) -> OwnedFd:
        """Return a new descriptor of an entry's file, which the caller must close.

        In an incoming store, the entries that this entry requires are retrieved first.

        Args:
            name: the name of the entry.
            type: the class of the object to return; by default `Memfd` for a file that can have
                seals, and `OwnedFd` for others.

        Raises:
            KeyError: there is no such entry.
            PreservedMemoryError: pyluo refuses because the caller's memory cgroup has no room for
                the file (ENOMEM). The file is still in the session.
            LuoError: see `IncomingSession.retrieve`.
        """
        with self._lock:
            entry = self._entries[name]
            chosen = type or _TYPES.get(entry.kind, OwnedFd)
            if name in self._files:
                fd = wrap_new_fd(_duplicate(self._files[name]), chosen)
            else:
                fd = self._retrieve(entry, chosen)
            self._handed_out.add(name)
            return fd

    @contextmanager
    def borrow(self, name: str) -> Iterator[OwnedFd]:
        """Return a descriptor of an entry's file that is closed at the end of the ``with`` block.

        In an incoming store, the entry is retrieved if necessary, but does not count as returned by
        `get`: `finish` still refuses to destroy it.

        Raises:
            KeyError: there is no such entry.
            LuoError: see `get`.
        """
        with self._lock:
            was_handed_out = name in self._handed_out
            fd = self.get(name)
            if not was_handed_out:
                self._handed_out.discard(name)
        with fd:
            yield fd

    def _retrieve(self, entry: Entry, kind: type[F]) -> F:
        """Retrieve the entries that an entry requires, and then the entry; return its file."""
        session = self._require_incoming("get")
        for needed in entry.requires:
            if needed not in self._retrieved:
                self._retrieve(self._entries[needed], OwnedFd).close()
        if entry.name not in self._retrieved:
            subject = f"store {self._name!r}, entry {entry.name!r}"
            guards.refuse_full_cgroup(entry.size, subject)
        fd = session.retrieve(entry.token, kind)
        self._retrieved.add(entry.name)
        return fd

    def add(
        self,
        name: str,
        fd: OwnedFd | int,
        *,
        requires: Collection[str] = (),
        meta: Mapping[str, Any] | None = None,
        allow_noexec: bool = False,
    ) -> Entry:
        """Preserve a file under a name, as the last entry of the store.

        Args:
            name: the name of the new entry.
            fd: a descriptor of the file, which the store duplicates.
            requires: the names of entries that must be retrieved before this one, and finished
                after it.
            meta: metadata of the entry; JSON must be able to represent it.
            allow_noexec: see `OutgoingSession.preserve`.

        Raises:
            FdStoreError: the name is taken (EEXIST); a required entry is not in the store (ENOENT);
                the table of contents is full (ENOSPC); the store is incoming (EPERM).
            LuoError: see `OutgoingSession.preserve`. The store is unchanged then.
        """
        with self._lock:
            session = self._require_outgoing("add")
            session.fileno()  # raises if the session is closed, before the table is written
            if not name or name in self._entries:
                raise self._error("add", errno.EEXIST, f"entry {name!r}", "Choose another name")
            if missing := [needed for needed in requires if needed not in self._entries]:
                raise self._error(
                    "add", errno.ENOENT, f"entry {name!r} requires {missing}", "Add these first"
                )
            duplicate = OwnedFd(_duplicate(fd))
            try:
                entry = Entry(
                    name=name,
                    token=max((entry.token for entry in self._entries.values()), default=0) + 1,
                    kind="memfd" if supports_seals(duplicate.fileno()) else "file",
                    size=os.fstat(duplicate.fileno()).st_size,
                    requires=tuple(requires),
                    meta=dict(meta or {}),
                    preserved=False,
                )
                self._files[name] = duplicate
                self._write({**self._entries, name: entry})
            except BaseException:
                self._files.pop(name, None)
                duplicate.close()
                raise
            # From here on the session may have the file. Only a LuoError tells that it does not;
            # after any other exception, the entry stays in the table as not yet preserved.
            try:
                session.preserve(duplicate, entry.token, allow_noexec=allow_noexec)
            except LuoError:
                self._write({key: old for key, old in self._entries.items() if key != name})
                self._files.pop(name).close()
                raise
            entry = dataclasses.replace(entry, preserved=True)
            self._write({**self._entries, name: entry})
            return entry

    def set_meta(self, meta: Mapping[str, Any], *, name: str | None = None) -> None:
        """Replace the metadata of the store, or of the entry `name`.

        Raises:
            KeyError: there is no such entry.
            FdStoreError: the table is full (ENOSPC), or the store is incoming (EPERM). The metadata
                is unchanged in both cases.
        """
        with self._lock:
            self._require_outgoing("set_meta")
            if name is None:
                self._write(self._entries, dict(meta))
            else:
                entry = dataclasses.replace(self._entries[name], meta=dict(meta))
                self._write({**self._entries, name: entry})

    def remove(self, name: str, *, device: LiveUpdate | None = None) -> None:
        """Remove an entry, so that its file is no longer preserved.

        The kernel cannot remove a single file from a session, so the session is discarded and
        created again with the other entries. If the jump comes in between, nothing is carried over.
        If the call fails half-way, the store keeps the files that are not preserved yet, and
        `renew` preserves them.

        Raises:
            KeyError: there is no such entry.
            FdStoreError: other entries require this one, or another process has the session open,
                so that discarding would not end the session (EBUSY); the store is incoming (EPERM).
                Nothing was changed.
            DeviceBusyError: the device is open elsewhere (EBUSY); nothing was changed.
            LuoError: see `OutgoingSession.preserve`.
        """
        with self._lock:
            session = self._require_outgoing("remove")
            entry = self._entries[name]
            if needing := [other.name for other in self.entries if name in other.requires]:
                raise self._error(
                    "remove", errno.EBUSY, f"entry {name!r}", f"Remove {needing} first"
                )
            if others := self._other_holders(session):
                raise self._error(
                    "remove",
                    errno.EBUSY,
                    f"entry {name!r}",
                    f"The session is also held by {', '.join(others)}, so it would not end",
                )
            with _open_device(device) as luo:
                del self._entries[entry.name]
                self._recreate_session(luo)
                self._files.pop(name).close()

    def _other_holders(self, session: OutgoingSession) -> list[str]:
        """Return words for each other open descriptor of this session that the caller may see."""
        this_one = os.getpid(), session.fileno()
        return [
            f"process {each.pid} ({each.command!r}, fd {each.fd})"
            for each in open_sessions()
            if (each.pid, each.fd) != this_one
            and each.session == self._name
            and each.direction != "incoming"  # None, for an unknown direction, counts as outgoing
        ]

    def renew(
        self,
        *,
        destroy: Collection[str] = (),
        device: LiveUpdate | None = None,
        allow_noexec: bool = False,
    ) -> None:
        """Preserve all entries for the next live update, with the same names and order.

        `renew` retrieves the entries that are not retrieved yet, finishes the incoming session, and
        preserves all files in a new outgoing session. In between only this process has the files:
        if the process dies, they are lost. In an outgoing store, `renew` preserves the entries that
        an earlier failure left out, if there are any.

        Args:
            destroy: the names of entries that are not preserved again, and so are destroyed.
            device: the open device; by default the call opens and closes the device itself.
            allow_noexec: see `OutgoingSession.preserve`.

        Raises:
            FdStoreError: an entry to destroy does not exist (ENOENT), or another entry requires it
                (EBUSY).
            PreservedMemoryError: files have grown since they were retrieved, and there is too
                little memory to preserve them (ENOMEM).
            LuoError: a file could not be retrieved; nothing is finished yet, and another call can
                name the entry in `destroy`. Or a file could not be preserved; the store still has
                all files, and `renew` can be called again.
        """
        with self._lock:
            session = self._session
            if not isinstance(session, IncomingSession):
                self._renew_outgoing(session, destroy, device)
                return
            kept = self._entries_without("renew", destroy)
            for entry in kept.values():
                if entry.name not in self._files:
                    self._files[entry.name] = self._retrieve(entry, OwnedFd)
                if not allow_noexec:
                    subject = partial(str, f"store {self._name!r}, entry {entry.name!r}")
                    guards.refuse_noexec(self._files[entry.name].fileno(), subject)
            self._refuse_growth(kept)
            with _open_device(device) as luo:
                outgoing = luo.create_session(self._name)
            waiting = _not_preserved_yet(kept)
            try:
                table_contents = Contents(tuple(waiting.values()), self._meta)
                table = _new_table(outgoing, table_contents, self._table_size)
            except BaseException:
                outgoing.discard()
                raise
            self._finishing = True
            try:
                session.finish()
            except LuoError:
                self._finishing = False
                outgoing.discard()
                table.memfd.close()
                raise
            self._session, self._table, self._entries = outgoing, table, waiting
            self._finishing = False
            for name in set(self._files) - set(kept):
                self._files.pop(name).close()
            self._preserve_rest(outgoing)

    def _refuse_growth(self, names: Iterable[str]) -> None:
        """Refuse to preserve files again if they have grown and there is too little memory.

        Files that have not grown take no additional memory.
        """
        fds = [self._files[name].fileno() for name in names]
        guards.refuse_excess_memory(fds, partial(str, f"store {self._name!r}"), in_scratch=False)

    def _renew_outgoing(
        self,
        session: OutgoingSession,
        destroy: Collection[str],
        device: LiveUpdate | None,
    ) -> None:
        """Preserve the entries of an outgoing store that an earlier failure left out."""
        if destroy:
            raise self._error("renew", errno.EPERM, f"{list(destroy)}", "Use remove()")
        self._refuse_growth(self._left_out())
        if session.closed:
            with _open_device(device) as luo:
                self._recreate_session(luo)
        else:
            self._preserve_rest(session)

    def finish(self, *, destroy: Collection[str] = ()) -> None:
        """Finish an incoming store: end its session, which destroys the files nobody retrieved.

        The kernel finishes the last entry first. Finishing a store twice does nothing.

        Args:
            destroy: the names of entries that may be destroyed although `get` did not return them.

        Raises:
            FdStoreError: entries would be destroyed that `get` did not return and that are not in
                `destroy` (EBUSY); a name in `destroy` is not in the store (ENOENT); the store is
                outgoing (EPERM). Nothing is finished in these cases.
            LuoError: see `IncomingSession.finish`.
        """
        with self._lock:
            session = self._require_incoming("finish")
            if session.closed:
                return
            self._check_names("finish", destroy)
            if left := [name for name in self if name not in {*self._handed_out, *destroy}]:
                raise self._error(
                    "finish",
                    errno.EBUSY,
                    f"entries {left}, which get() did not return",
                    f"They would be destroyed: get() them, or call finish(destroy={left})",
                )
            session.finish()
            self._close_files()

    def discard(self) -> None:
        """Give up an outgoing store, so that its files are no longer preserved.

        The store closes its own descriptors. A file of which nobody else has a descriptor is lost;
        in a renewed store, these are the files that `get` did not return.

        Raises:
            FdStoreError: the store is incoming (EPERM).
        """
        with self._lock:
            self._require_outgoing("discard").discard()
            self._close_files()

    def detach(self) -> int:
        """Return the descriptor of the session without closing it; the caller owns it from now on.

        The store closes its descriptors of the files. When the last descriptor of the session is
        closed, the files of an outgoing session are no longer preserved, and those of an incoming
        session are destroyed unless they were retrieved.

        Raises:
            FdStoreError: a failed `renew` or `remove` left files out of the session (EBUSY).
        """
        with self._lock:
            if left := self._left_out():
                raise self._error("detach", errno.EBUSY, f"entries {left}", "renew() it first")
            fd = self._session.detach()
            self._close_files()
            return fd

    def __enter__(self) -> Self:
        self._session.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.incoming and kind is None:
            self.finish()
        elif self._created and kind is not None:
            self.discard()

    def __del__(self) -> None:
        # The session object warns for itself, and the session keeps the files that are in it. Files
        # that are not in the session may have no other descriptor than the store's, so these
        # descriptors stay open.
        if left := self._left_out():
            warnings.warn(
                f"{self!r} was dropped with {left} not preserved; their descriptors stay open",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            for name in left:
                self._files.pop(name).detach()
        self._close_files()

    def __repr__(self) -> str:
        direction = "incoming" if self.incoming else "outgoing"
        return f"<FdStore {self._name!r} {direction} entries={len(self)}>"

    def _contents(self) -> Contents:
        return Contents(tuple(self._entries.values()), self._meta)

    def _read_table(self, session: IncomingSession) -> None:
        """Read the table, and find out whether the session has the entries marked as not preserved.

        The jump came while these entries were being added.
        """
        with session.retrieve(_TABLE_TOKEN, Memfd) as memfd:
            self._table_size = memfd.size // 2
            read, _, _ = contents.decode(memfd.read, memfd.size)
        self._meta = read.meta
        lost: list[str] = []
        for entry in read.entries:
            requires = tuple(name for name in entry.requires if name not in lost)
            self._entries[entry.name] = dataclasses.replace(
                entry, preserved=True, requires=requires
            )
            try:
                if not entry.preserved:
                    self._retrieve(self._entries[entry.name], OwnedFd).close()
            except TokenNotFoundError:
                lost.append(entry.name)
                del self._entries[entry.name]
            except LuoError:
                continue  # the entry exists; get() will raise the same error again
        self._lost = tuple(lost)

    def _table_error(self, error: LuoError, session: IncomingSession) -> FdStoreError:
        """Return the exception for a table that cannot be read, with the session in `session`."""
        number, hint = error.errno or errno.EIO, error.hint
        if isinstance(error, TokenNotFoundError):
            what = "no table of contents"
        elif isinstance(error, FdStoreError):
            what = f"its table: {error.subject}"
        else:
            what = f"its table: {error}"
        refusal = self._error("retrieve", number, what, hint)
        refusal.session = session
        return refusal

    def _left_out(self) -> list[str]:
        """Return the names of the entries whose files the store has, but the session does not."""
        files: dict[str, OwnedFd] = getattr(self, "_files", {})
        entries: dict[str, Entry] = getattr(self, "_entries", {})
        # After an interrupted finish, the session may have lost any of its files.
        finishing = getattr(self, "_finishing", False)
        return [
            name for name in files if finishing or (name in entries and not entries[name].preserved)
        ]

    def _write(self, entries: dict[str, Entry], meta: dict[str, Any] | None = None) -> None:
        """Replace the entries, and the metadata if given, in the table and then in this object."""
        meta = self._meta if meta is None else meta
        if self._table is None:
            raise ValueError(f"{self!r} is closed")
        self._table.write(Contents(tuple(entries.values()), meta))
        self._entries, self._meta = entries, meta

    def _recreate_session(self, luo: LiveUpdate) -> None:
        """Discard the session, create a new one with the same name, and preserve all entries in it.

        pyluo's own checks are skipped, because the files were preserved before. If the table cannot
        be preserved, the session stays closed, and the next call tries all of this again.
        """
        assert isinstance(self._session, OutgoingSession)
        assert self._table is not None
        waiting = _not_preserved_yet(self._entries)
        self._session.discard()
        self._write(waiting)
        session = self._create_under_same_name(luo)
        try:
            session.preserve_many({_TABLE_TOKEN: self._table.memfd}, guarded=False)
        except BaseException:
            session.discard()
            raise
        self._session = session
        self._preserve_rest(session)

    def _create_under_same_name(self, luo: LiveUpdate) -> OutgoingSession:
        """Create a session with the store's name, once no process has the old session open.

        A process that lists the open sessions may have a duplicate of the descriptor for a moment.
        """
        deadline = time.monotonic() + _RECREATE_TIMEOUT
        while True:
            try:
                return luo.create_session(self._name)
            except SessionExistsError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _preserve_rest(self, session: OutgoingSession) -> None:
        """Preserve the entries that are not preserved yet, in order, and mark them in the table.

        pyluo's own checks are skipped, because the files were preserved before.
        """
        rest = {entry.token: entry.name for entry in self.entries if not entry.preserved}
        while rest:
            done: Collection[int] = ()
            try:
                files = {token: self._files[name] for token, name in rest.items()}
                session.preserve_many(files, guarded=False)
                done = list(rest)
            except TokenInUseError as error:
                # An interrupted call has preserved this file already: no other file of the store
                # ever has the same token.
                done = [*error.preserved, list(rest)[len(error.preserved)]]
            except LuoError as error:
                done = error.preserved
                raise
            finally:
                for token in done:
                    name = rest.pop(token)
                    self._entries[name] = dataclasses.replace(self._entries[name], preserved=True)
                self._write(self._entries)

    def _entries_without(self, operation: str, names: Collection[str]) -> dict[str, Entry]:
        """Return the entries not in `names`; raise if one of these requires a name in `names`."""
        self._check_names(operation, names)
        kept = {name: entry for name, entry in self._entries.items() if name not in names}
        for entry in kept.values():
            if needed := set(entry.requires) & set(names):
                raise self._error(
                    operation,
                    errno.EBUSY,
                    f"entries {sorted(needed)}",
                    f"Entry {entry.name!r} requires them",
                )
        return kept

    def _check_names(self, operation: str, names: Collection[str]) -> None:
        if unknown := [name for name in names if name not in self._entries]:
            raise self._error(
                operation, errno.ENOENT, f"entries {unknown}", f"The store has {list(self)}"
            )

    def _require_incoming(self, operation: str) -> IncomingSession:
        if isinstance(self._session, IncomingSession):
            return self._session
        raise self._error(operation, errno.EPERM, "", "Only an incoming store can do this")

    def _require_outgoing(self, operation: str) -> OutgoingSession:
        if isinstance(self._session, OutgoingSession):
            return self._session
        raise self._error(
            operation, errno.EPERM, "", "Only an outgoing store can do this: renew() it first"
        )

    def _error(self, operation: str, number: int, what: str, hint: str) -> FdStoreError:
        subject = f"store {self._name!r}" + (f", {what}" if what else "")
        return FdStoreError(number, f"FdStore.{operation}", subject, hint)

    def _close_files(self) -> None:
        """Close the store's own descriptors: those of the files and of the table."""
        files, self._files = getattr(self, "_files", {}), {}
        for file in files.values():
            file.close()
        table, self._table = getattr(self, "_table", None), None
        if table is not None:
            table.memfd.close()


class _Table:
    """The memfd with the table of contents; `write` uses its two slots alternately."""

    def __init__(self, name: str, room: int) -> None:
        self._room = room
        self._generation = 0
        self.memfd = Memfd.create(f"pyluo table of {name}"[:60], 2 * room)

    def write(self, table_contents: Contents) -> None:
        """Write the table into the older slot.

        A reader uses the other slot until this one is complete, because its checksum is wrong.
        """
        generation = self._generation + 1
        slot = contents.encode(table_contents, generation, self._room)
        self.memfd.write(slot, (generation % 2) * self._room)
        self._generation = generation


def _new_table(session: OutgoingSession, table_contents: Contents, room: int) -> _Table:
    """Create a table with these contents and preserve it.

    Each slot has at least `room` bytes, and at least twice the size of the contents.
    """
    needed = len(contents.encode(table_contents, 1, 1 << 30))
    table = _Table(session.name, max(room, 2 * needed))
    try:
        table.write(table_contents)
        session.preserve(table.memfd, _TABLE_TOKEN)
    except BaseException:
        table.memfd.close()
        raise
    return table


def _not_preserved_yet(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: dataclasses.replace(entry, preserved=False) for name, entry in entries.items()}


def _open_device(device: LiveUpdate | None) -> AbstractContextManager[LiveUpdate]:
    """Return a context manager of the given device, or one that opens and closes the device."""
    return nullcontext(device) if device is not None else LiveUpdate()


def _duplicate(fd: OwnedFd | int) -> int:
    number = fileno_of(fd)
    with raising("dup", f"descriptor {number}"):
        return os.dup(number)
