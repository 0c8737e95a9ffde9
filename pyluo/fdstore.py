"""A session whose files have names, an order and metadata, and that can be carried on and on.

What the store knows is kept in the session itself, in a memfd at token 0, which is right at every
moment up to the jump: an entry is written down before it is preserved, as an intention, and again
once it is in.
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
from pyluo.descriptor import OwnedFd, adopt, number_of
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
    """Named descriptors that go through live updates together.

    On the way out (`create`) entries are added and removed; after the jump (`retrieve`) they are
    had back, and either the store is finished or `renew()` makes it ready for the next jump. The
    store keeps descriptors of its own: what a caller passes in or gets out stays the caller's.

    As a context manager an exception discards a store that was created, and leaves one that was
    retrieved as it is, renewed or not; leaving normally finishes an incoming one. Safe to use from
    several threads, which take turns.

    Args:
        session: an outgoing session without a file under token 0, or an incoming one that was a
            store.
        table_size: bytes kept for the table of contents, twice; some 120 bytes are used by each
            entry, and what its metadata takes as JSON.

    Raises:
        FdStoreError: the table of an incoming session is damaged (EBADMSG) or newer than this
            pyluo (EPROTONOSUPPORT), or there is none (ENOENT). Nothing is finished; the session is
            on the exception.
        TokenInUseError: the outgoing session has a file under token 0.
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
        self._retrieved: set[str] = set()  # by the kernel: retrieving it again cannot fail
        self._handed_out: set[str] = set()  # to a caller, by get()
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
        """An empty store in a new session, for the next live update.

        Args:
            name: of the session.
            device: opened for the while of the call if it is not given.
            table_size: as for the class.

        Raises:
            LuoError: as `LiveUpdate` and `LiveUpdate.create_session` do.
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
        """The store of this name that the previous kernel handed over.

        Raises:
            LuoError: as `LiveUpdate` and `LiveUpdate.retrieve_session` do.
            FdStoreError: as for the class.
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
        """The session that holds the store now; `renew` and `remove` put another in its place."""
        return self._session

    @property
    def outgoing(self) -> OutgoingSession:
        """The session, of an outgoing store.

        Raises:
            FdStoreError: EPERM, the store is incoming.
        """
        return self._require_outgoing("outgoing")

    @property
    def incoming(self) -> bool:
        """Whether the store came in from the previous kernel, and is not yet renewed."""
        return isinstance(self._session, IncomingSession)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is in the store, in order."""
        with self._lock:
            return tuple(self._entries.values())

    @property
    def meta(self) -> dict[str, Any]:
        """A copy of the store's own metadata; `set_meta` changes it."""
        with self._lock:
            return dict(self._meta)

    @property
    def lost(self) -> tuple[str, ...]:
        """Names that were about to be preserved when the jump came, and did not come along."""
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
        """A new descriptor of an entry, the caller's to close.

        From an incoming store the files that it requires are retrieved before it.

        Args:
            name: of the entry.
            type: what to make of the descriptor; without it, what was added: a `Memfd` for a file
                with seals.

        Raises:
            KeyError: there is no such entry.
            PreservedMemoryError: ENOMEM, refused by pyluo: the caller's memory cgroup has no room
                for it; it is still in the session.
            LuoError: as `IncomingSession.retrieve` does.
        """
        with self._lock:
            entry = self._entries[name]
            chosen = type or _TYPES.get(entry.kind, OwnedFd)
            if name in self._files:
                fd = adopt(_duplicate(self._files[name]), chosen)
            else:
                fd = self._retrieve(entry, chosen)
            self._handed_out.add(name)
            return fd

    @contextmanager
    def borrow(self, name: str) -> Iterator[OwnedFd]:
        """A descriptor of an entry for the while of a block, which does not count as had back.

        `finish` still refuses to destroy the entry. From an incoming store it is retrieved.

        Raises:
            KeyError: there is no such entry.
            LuoError: as `get` does.
        """
        with self._lock:
            had = name in self._handed_out
            fd = self.get(name)
            if not had:
                self._handed_out.discard(name)
        with fd:
            yield fd

    def _retrieve(self, entry: Entry, kind: type[F]) -> F:
        """Retrieves an entry, after what it requires."""
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
        """Preserves a file under a name, after everything that is in the store already.

        Args:
            name: of the new entry.
            fd: the file; the store keeps a descriptor of its own.
            requires: names of entries that have to be retrieved before it, and finished after it.
            meta: what to remember of it: whatever JSON carries.
            allow_noexec: as for `OutgoingSession.preserve`.

        Raises:
            FdStoreError: EEXIST, the name is taken; ENOENT, something required is not in the
                store; ENOSPC, the table of contents is full; EPERM, the store is incoming.
            LuoError: as `OutgoingSession.preserve` does. The store is as it was then.
        """
        with self._lock:
            session = self._require_outgoing("add")
            session.fileno()  # or it is closed, and nothing is written down
            if not name or name in self._entries:
                raise self._error("add", errno.EEXIST, f"entry {name!r}", "Choose another name")
            if missing := [needed for needed in requires if needed not in self._entries]:
                raise self._error(
                    "add", errno.ENOENT, f"entry {name!r} requires {missing}", "Add these first"
                )
            own = OwnedFd(_duplicate(fd))
            try:
                entry = Entry(
                    name=name,
                    token=max((entry.token for entry in self._entries.values()), default=0) + 1,
                    kind="memfd" if supports_seals(own.fileno()) else "file",
                    size=os.fstat(own.fileno()).st_size,
                    requires=tuple(requires),
                    meta=dict(meta or {}),
                    preserved=False,
                )
                self._files[name] = own
                self._write({**self._entries, name: entry})
            except BaseException:
                self._files.pop(name, None)
                own.close()
                raise
            # From here on the kernel may have it: only its own refusal says that it has not.
            try:
                session.preserve(own, entry.token, allow_noexec=allow_noexec)
            except LuoError:
                self._write({key: old for key, old in self._entries.items() if key != name})
                self._files.pop(name).close()
                raise
            entry = dataclasses.replace(entry, preserved=True)
            self._write({**self._entries, name: entry})
            return entry

    def set_meta(self, meta: Mapping[str, Any], *, name: str | None = None) -> None:
        """Replaces the metadata of the store, or of one entry.

        Raises:
            KeyError: there is no such entry.
            FdStoreError: ENOSPC, the table is full; EPERM, the store is incoming. The metadata is
                what it was.
        """
        with self._lock:
            self._require_outgoing("set_meta")
            if name is None:
                self._write(self._entries, dict(meta))
            else:
                entry = dataclasses.replace(self._entries[name], meta=dict(meta))
                self._write({**self._entries, name: entry})

    def remove(self, name: str, *, device: LiveUpdate | None = None) -> None:
        """Takes one entry out; its file is the caller's alone again.

        The kernel gives up whole sessions only, so the session is discarded and made anew with the
        rest: a jump in the meantime would find nothing. If that fails half-way, the store knows
        what is not in, and `renew()` takes it up again.

        Raises:
            KeyError: there is no such entry.
            FdStoreError: EBUSY, other entries require it, or another process holds the session,
                which would not end then; EPERM, the store is incoming. Nothing was touched.
            DeviceBusyError: the device is open elsewhere; nothing was touched.
            LuoError: as `OutgoingSession.preserve` does.
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
                    f"The session is also held by {', '.join(others)}, and would not end",
                )
            with _open_device(device) as luo:
                del self._entries[entry.name]
                self._recreate_session(luo)
                self._files.pop(name).close()

    def _other_holders(self, session: OutgoingSession) -> list[str]:
        """The other descriptors of this session, as far as the caller may see them."""
        own = os.getpid(), session.fileno()
        return [
            f"process {each.pid} ({each.command!r}, fd {each.fd})"
            for each in open_sessions()
            if (each.pid, each.fd) != own
            and each.session == self._name
            and each.direction != "incoming"  # it may be one that cannot be told
        ]

    def renew(
        self,
        *,
        destroy: Collection[str] = (),
        device: LiveUpdate | None = None,
        allow_noexec: bool = False,
    ) -> None:
        """Carries everything on to the next live update, by the same names and in the same order.

        Retrieves what was not yet, finishes the incoming session and preserves all of it in a new
        one. Between the two this process alone has the files: they would go with it. On an
        outgoing store it preserves what a failure left out, and is nothing otherwise.

        Args:
            destroy: names of entries to leave behind.
            device: opened for the while of the call if it is not given.
            allow_noexec: as for `OutgoingSession.preserve`.

        Raises:
            FdStoreError: ENOENT, no such entry to destroy; EBUSY, another entry requires it.
            PreservedMemoryError: ENOMEM, files have grown since, and there is no memory for that.
            LuoError: a file could not be retrieved: nothing is finished yet, and `destroy` leaves
                it behind. Or one could not be preserved: the store still has all the files, and
                `renew` can be called again.
        """
        with self._lock:
            session = self._session
            if not isinstance(session, IncomingSession):
                self._preserve_left_out(session, destroy, device)
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
        """Files that came over take no more memory than they have, unless they grew since."""
        fds = [self._files[name].fileno() for name in names]
        guards.refuse_excess_memory(fds, partial(str, f"store {self._name!r}"), in_scratch=False)

    def _preserve_left_out(
        self,
        session: OutgoingSession,
        destroy: Collection[str],
        device: LiveUpdate | None,
    ) -> None:
        """Takes up again what a failure left out of an outgoing store."""
        if destroy:
            raise self._error("renew", errno.EPERM, f"{list(destroy)}", "Use remove()")
        self._refuse_growth(self._left_out())
        if session.closed:
            with _open_device(device) as luo:
                self._recreate_session(luo)
        else:
            self._preserve_rest(session)

    def finish(self, *, destroy: Collection[str] = ()) -> None:
        """Ends an incoming store, in the reverse of its order; a second time does nothing.

        Args:
            destroy: names of entries that were not retrieved, and need not be.

        Raises:
            FdStoreError: EBUSY, entries would be destroyed that were neither had from `get` nor
                named; ENOENT, a name is not in the store; EPERM, the store is
                outgoing. Nothing is finished.
            LuoError: as `IncomingSession.finish` does.
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
                    f"entries {left}, which nobody got",
                    f"They would be destroyed: get() them, or say finish(destroy={left})",
                )
            session.finish()
            self._close_files()

    def discard(self) -> None:
        """Gives an outgoing store up; the files stay with those who have them open.

        The store's own descriptors are closed: of a renewed store, a file that nobody took out
        with `get` is gone.

        Raises:
            FdStoreError: EPERM, the store is incoming.
        """
        with self._lock:
            self._require_outgoing("discard").discard()
            self._close_files()

    def detach(self) -> int:
        """Gives up the descriptor of the session, still open, and closes the store's own.

        Returns:
            The descriptor: what its end means is the caller's to mind now.

        Raises:
            FdStoreError: EBUSY, files are not in the session that a failed `renew` or `remove`
                left to the store alone.
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
        # The session warns of itself, and files that are in it do not hang on these; of the others
        # this may be the only descriptor.
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
        """Takes the table's word, but for entries that were on their way in at the jump."""
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
                continue  # it is there: get() says what is wrong, and destroy= leaves it behind
        self._lost = tuple(lost)

    def _table_error(self, error: LuoError, session: IncomingSession) -> FdStoreError:
        """Says whose table it is, and keeps the session within the caller's reach."""
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
        """The entries that are in no session, though the store has their files."""
        files: dict[str, OwnedFd] = getattr(self, "_files", {})
        entries: dict[str, Entry] = getattr(self, "_entries", {})
        # Interrupted in the middle of a finish: the session may have them no more.
        finishing = getattr(self, "_finishing", False)
        return [
            name for name in files if finishing or (name in entries and not entries[name].preserved)
        ]

    def _write(self, entries: dict[str, Entry], meta: dict[str, Any] | None = None) -> None:
        """Makes this the store's contents, in the table first."""
        meta = self._meta if meta is None else meta
        if self._table is None:
            raise ValueError(f"{self!r} is closed")
        self._table.write(Contents(tuple(entries.values()), meta))
        self._entries, self._meta = entries, meta

    def _recreate_session(self, luo: LiveUpdate) -> None:
        """A new session, with the table and with all entries: what was in the old one is allowed.

        What fails before the table is in leaves the session closed, and so to be rebuilt.
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
        """The session anew; who looks at sessions at this moment has the old one for a moment."""
        deadline = time.monotonic() + _RECREATE_TIMEOUT
        while True:
            try:
                return luo.create_session(self._name)
            except SessionExistsError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _preserve_rest(self, session: OutgoingSession) -> None:
        """Preserves the entries that are not in, in order; writes down those that are then.

        Their pages were preserved before, so that pyluo's own checks have nothing to say to them.
        """
        rest = {entry.token: entry.name for entry in self.entries if not entry.preserved}
        while rest:
            done: Collection[int] = ()
            try:
                files = {token: self._files[name] for token, name in rest.items()}
                session.preserve_many(files, guarded=False)
                done = list(rest)
            except TokenInUseError as error:
                # An interrupted try had put it in: tokens are never used twice.
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
        """The entries that stay when `names` go."""
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
        """Closes the descriptors that are the store's own."""
        files, self._files = getattr(self, "_files", {}), {}
        for file in files.values():
            file.close()
        table, self._table = getattr(self, "_table", None), None
        if table is not None:
            table.memfd.close()


class _Table:
    """The memfd of the table of contents, and which of its two slots is written next."""

    def __init__(self, name: str, room: int) -> None:
        self._room = room
        self._generation = 0
        self.memfd = Memfd.create(f"pyluo table of {name}"[:60], 2 * room)

    def write(self, table_contents: Contents) -> None:
        """Writes in place; until it is whole, the table before it counts."""
        generation = self._generation + 1
        slot = contents.encode(table_contents, generation, self._room)
        self.memfd.write(slot, (generation % 2) * self._room)
        self._generation = generation


def _new_table(session: OutgoingSession, table_contents: Contents, room: int) -> _Table:
    """A table with these contents, preserved, and with room for as many again."""
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
    """The device given, which stays open, or one of its own for the while."""
    return nullcontext(device) if device is not None else LiveUpdate()


def _duplicate(fd: OwnedFd | int) -> int:
    number = number_of(fd)
    with raising("dup", f"descriptor {number}"):
        return os.dup(number)
