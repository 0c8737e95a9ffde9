"""`OutgoingStore`: named files that the next live update carries over."""

from __future__ import annotations

import errno
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakMethod

from pyluo.descriptor import OwnedFd, fileno_of
from pyluo.errors import (
    RequestError,
    SessionExistsError,
    SessionNotFoundError,
    TokenInUseError,
)
from pyluo.exclusive import exclusively
from pyluo.guest_ram import GuestRam
from pyluo.keepers.choice import choose_keeper
from pyluo.keepers.keeper import KeeperChoice
from pyluo.keepers.parcel import Parcel
from pyluo.memfd import Memfd, supports_seals
from pyluo.session import OutgoingSession
from pyluo.stores.entry import Contents, Entry, NewEntry, as_json_value
from pyluo.stores.files_in_use import FileId, file_id
from pyluo.stores.journal import Journal, is_of_table
from pyluo.stores.kept import (
    find_kept_incoming,
    kept_sessions,
    label_of_this_boot,
    release_incoming,
    release_outgoing,
)
from pyluo.stores.records import Add, Meta, Remove, Settle
from pyluo.stores.store import SessionSource, Store, open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from pyluo.keepers.keeper import Keeper

__all__ = ["OutgoingStore"]


class OutgoingStore(Store):
    """Named files that the next live update carries over together.

    A store is a session with a table of contents in it. The jump may come at any moment and finds a
    valid table. `create` makes a store, `IncomingStore.renew` makes one of what the last live
    update carried over, and `open` takes over the store of a process that has ended.

    Only `discard` gives up what is in the store. Every call can be interrupted by an exception in a
    signal handler; the same call again completes it.

    The caller owns the descriptors that it adds, and may close them: the session keeps the files.
    The kernel gives out no file of an outgoing session, so that there is no `get` before the jump.
    """

    def __init__(self, name: str, keeper: Keeper | None) -> None:
        super().__init__(name, keeper)
        self._journal = Journal(name, _weakly(self._keep))
        self._opened: OutgoingSession | None = None
        self._tokens: dict[FileId, int] = {}  # of the files in the session, as far as known
        self._addition: _Addition | None = None
        self._waiting: Parcel | None = None  # the files of a renewal that is not complete
        self._removing: tuple[str, ...] = ()  # the names of a `remove` that is not complete

    @classmethod
    def create(
        cls,
        name: str,
        *,
        device: SessionSource | None = None,
        wait: float = 0.0,
        keeper: Keeper | KeeperChoice = KeeperChoice.DEFAULT,
    ) -> Self:
        """Create an empty store in a new session.

        Args:
            name: the name of the session.
            device: what creates the session; by default the call opens and closes the device.
            wait: for how many seconds to wait while the device is open elsewhere.
            keeper: what keeps the session if this process ends. By default the service manager, if
                it stores descriptors for this process, or else a holder process.

        Raises:
            SessionExistsError: an outgoing session of this name exists (EEXIST).
            RequestError: see `LiveUpdate`, `LiveUpdate.create_session` and `Keeper.keep`.
        """
        store = cls(name, choose_keeper(keeper))
        try:
            store._begin(device, wait)
            store._keep()
            return store
        except BaseException as error:
            if isinstance(error, SessionExistsError) and store._is_kept():
                error.hint = f"A keeper has it: OutgoingStore.open({name!r}) takes it over"
            store.discard()
            raise

    @classmethod
    def from_session(cls, session: OutgoingSession) -> Self:
        """Make a store in an empty session, which the store takes over.

        The store has no keeper.

        Raises:
            TokenInUseError: the session has a file with token 0 (EEXIST). The session is unchanged,
                and the caller still owns it.
        """
        store = cls(session.name, None)
        store._journal.begin(session)
        store._opened = session
        return store

    @classmethod
    def open(cls, name: str, *, keeper: Keeper | KeeperChoice = KeeperChoice.DEFAULT) -> Self:
        """Take over the store that an earlier process created, from the keeper.

        If that process died while it renewed an incoming store, the renewal is completed.

        Raises:
            SessionNotFoundError: the keeper has no such store (ENOENT).
            StoreError: the renewal had not yet finished the incoming store, which has all files:
                `IncomingStore.retrieve` and renew it again (EBUSY); or the table is damaged
                (EBADMSG).
            RequestError: see `Keeper.kept`, and `OutgoingSession.preserve` for a renewal.
        """
        store = cls(name, choose_keeper(keeper))
        session = store._find_kept_session()
        if session is None:
            raise SessionNotFoundError(
                errno.ENOENT,
                "OutgoingStore.open",
                f"store {name!r}",
                "No keeper has it: create() it",
            )
        store._opened = session
        try:
            store._resume()
        except BaseException:
            store._close()
            raise
        return store

    def _begin(self, device: SessionSource | None, wait: float) -> None:
        """Create the session with an empty table."""
        if self._opened is None:
            with open_device(device, wait) as source:
                self._opened = source.create_session(self._name)
        self._journal.begin(self._opened)

    @property
    def session(self) -> OutgoingSession:
        """The session of the store.

        Raises:
            ValueError: the store is closed or discarded.
        """
        if self._opened is None or self._opened.closed:
            raise ValueError(f"{self!r} is closed")
        return self._opened

    @property
    def closed(self) -> bool:
        """Whether the store was discarded, closed or detached."""
        return self._opened is None or self._opened.closed

    @property
    def _contents(self) -> Contents:
        return self._journal.contents

    @exclusively
    def add(
        self,
        name: str,
        file: OwnedFd | int | GuestRam,
        *,
        requires: Collection[str] = (),
        meta: Mapping[str, Any] | None = None,
        allow_noexec: bool = False,
    ) -> Entry:
        """Preserve a file under a name, as the last entry of the store.

        Args:
            name: the name of the new entry.
            file: a descriptor of the file, or a RAM of several files.
            requires: the names of entries that must be retrieved before this one, and finished
                after it.
            meta: metadata of the entry, which JSON must be able to represent; keys are strings.
            allow_noexec: see `OutgoingSession.preserve`.

        Raises:
            StoreError: the name is taken (EEXIST); a required entry is not in the store (ENOENT).
            TypeError, ValueError: JSON cannot represent the metadata, or the name is empty.
            RequestError: see `OutgoingSession.preserve`. The store is unchanged then.
        """
        return self._add([NewEntry(name, file, requires, meta)], allow_noexec)[0]

    @exclusively
    def add_many(
        self, entries: Iterable[NewEntry], *, allow_noexec: bool = False
    ) -> tuple[Entry, ...]:
        """Preserve several files, in order.

        Args:
            entries: the new entries. One may require another that comes before it.
            allow_noexec: see `OutgoingSession.preserve`.

        Raises:
            RequestError: see `add`. The entries before the one that failed may be in the store; the
                same call again adds the others.
        """
        return self._add(list(entries), allow_noexec)

    def _add(self, new: Sequence[NewEntry], allow_noexec: bool) -> tuple[Entry, ...]:
        session = self.session
        self._journal.catch_up()
        addition = _Addition.of(new)
        before, rest = self._addition, new
        if before is not None:
            self._settle(before)
            if before.same_as(addition):
                rest = [each for each in new if each.name not in self._contents.entries]
        self._check_names(rest)
        entries = [self._entry_for(each, addition) for each in rest]
        files: dict[int, OwnedFd | int] = {}
        for each, entry in zip(rest, entries, strict=True):
            files |= self._files_to_preserve(each, entry, addition)
        session.check(files, allow_noexec=allow_noexec)
        self._addition = addition
        if entries:
            self._append(Add(tuple(entries)))
            try:
                session.preserve_many(files, guarded=False)
            except RequestError:
                self._settle(addition)
                raise
            if len(entries) > 1:
                self._append(Settle())
        self._note_tokens(addition)
        added = tuple(self._contents.entries[each.name] for each in new)
        # In one line, so that an interrupted call is either complete or can be called again.
        self._addition = None; return added  # noqa: E702  # fmt: skip

    def _check_names(self, new: Sequence[NewEntry]) -> None:
        """Refuse entries whose names are taken, or that require what is not there."""
        names: set[str] = set()
        for each in new:
            if not isinstance(each.name, str) or not each.name:
                raise TypeError(f"{each.name!r} is not a name of an entry")
            if each.name in self._contents.entries or each.name in names:
                what = f"entry {each.name!r}"
                hint = "Choose another name, or remove() that entry first"
                raise self._error("add", errno.EEXIST, what, hint)
            if missing := [
                needed
                for needed in each.requires
                if needed not in names and needed not in self._contents.entries
            ]:
                what = f"entry {each.name!r} requires {missing}"
                raise self._error("add", errno.ENOENT, what, "Add these first")
            names.add(each.name)

    def _entry_for(self, new: NewEntry, addition: _Addition) -> Entry:
        """Return the entry for a new file.

        The files of a removed entry are still in the session, so they get their old tokens.
        """
        files = _files_of(new.file)
        tokens: list[int] = []
        for identity in addition.files[new.name]:
            token = self._tokens.get(identity, 0)
            if not token or token in self._contents.tokens:
                addition.last_token = max(addition.last_token, self._contents.last_token) + 1
                token = addition.last_token
            tokens.append(token)
        is_ram = isinstance(new.file, GuestRam)
        kind = "memfd" if supports_seals(fileno_of(files[0])) else "file"
        return Entry(
            name=new.name,
            tokens=tuple(tokens),
            sizes=tuple(os.fstat(fileno_of(file)).st_size for file in files),
            kind="ram" if is_ram else kind,
            requires=tuple(new.requires),
            meta=as_json_value(dict(new.meta or {}), f"metadata of entry {new.name!r}"),
            state=new.file.as_json() if isinstance(new.file, GuestRam) else {},
        )

    def _files_to_preserve(
        self, new: NewEntry, entry: Entry, addition: _Addition
    ) -> dict[int, OwnedFd | int]:
        identities = addition.files[new.name]
        return {
            token: file
            for token, file, identity in zip(
                entry.tokens, _files_of(new.file), identities, strict=True
            )
            if self._tokens.get(identity) != token
        }

    def _settle(self, addition: _Addition) -> None:
        """Find out which files of an interrupted or failed addition are in the session.

        The entries of the others are taken out of the table.
        """
        session = self.session
        names = [name for name in self._contents.unsettled if name in addition.files]
        missing: dict[str, None] = {}
        for name in names:
            for token, identity in zip(
                self._contents.entries[name].tokens, addition.files[name], strict=True
            ):
                if session.has(token):
                    self._tokens[identity] = token
                else:
                    missing[name] = None
        if missing:
            self._append(Remove(tuple(missing)))
        elif names:
            self._append(Settle())

    def _note_tokens(self, addition: _Addition) -> None:
        for name, identities in addition.files.items():
            tokens = self._contents.entries[name].tokens
            self._tokens |= dict(zip(identities, tokens, strict=True))

    def _complete(self) -> None:
        """Complete what an interrupted call began, before another call changes the store."""
        self._journal.catch_up()
        if self._addition is not None:
            self._settle(self._addition)
            self._addition = None

    def _append(self, record: Add | Meta | Remove | Settle) -> None:
        """Append a record to the table."""
        self._journal.append(self.session, record)

    @exclusively
    def set_meta(self, meta: Mapping[str, Any], *, name: str | None = None) -> None:
        """Replace the metadata of the store, or of the entry `name`.

        Raises:
            KeyError: there is no such entry.
            TypeError, ValueError: JSON cannot represent the metadata. It is unchanged.
            RequestError: there is no memory for it; see `OutgoingSession.preserve`. It is
                unchanged.
        """
        self._set_meta(as_json_value(dict(meta), "metadata"), name)

    @exclusively
    def update_meta(self, key: str, value: Any) -> None:
        """Set one key of the store's metadata.

        Raises:
            TypeError, ValueError, LuoError: see `set_meta`.
        """
        self._set_meta(as_json_value({**self._contents.meta, key: value}, "metadata"), None)

    def _set_meta(self, meta: dict[str, Any], name: str | None) -> None:
        self.session.fileno()  # raises if the store is closed
        if name is not None:
            self._contents.entries[name]
        self._complete()
        self._append(Meta(name, meta))

    @exclusively
    def remove(self, *names: str) -> None:
        """Remove entries, so that the next kernel destroys their files instead of listing them.

        The kernel gives back whole sessions only: until the jump or `discard`, the files stay
        preserved, and so keep their size and their memory. A removed file can be added again, under
        the same or another name.

        Raises:
            KeyError: there is no such entry.
            StoreError: other entries require one of these (EBUSY). Nothing was changed.
        """
        self.session.fileno()  # raises if the store is closed
        self._complete()
        if self._removing == names and not self._contents.entries.keys() & set(names):
            self._removing = ()
            return  # an interrupted call has removed them
        try:
            self._contents.check_removal(names)
        except ValueError as error:
            raise self._error(
                "remove", errno.EBUSY, f"entries {list(names)}", f"{error}: remove these as well"
            ) from None
        self._removing = names
        self._append(Remove(names))
        self._removing = ()

    def find_by_file(self, identities: Collection[FileId]) -> dict[FileId, tuple[str, int]]:
        """Return for each of these files the name of its entry, and where it begins in the entry.

        Files that this object has not added or renewed are left out, as are all files of a store
        that `open` took over. The place is the number of
        bytes in the files of the entry before this one; 0 unless the entry is a `GuestRam`.
        """
        places: dict[int, tuple[str, int]] = {}
        for entry in self._contents.entries.values():
            start = 0
            for token, size in zip(entry.tokens, entry.sizes, strict=True):
                places[token] = entry.name, start
                start += size
        tokens = {identity: self._tokens.get(identity, 0) for identity in identities}
        return {identity: places[token] for identity, token in tokens.items() if token in places}

    @exclusively
    def discard(self) -> None:
        """Give up the store: end its session, so that its files are no longer preserved.

        A file of which nobody has a descriptor is lost. Discarding a store twice does nothing. If
        another process has the session open, apart from the keeper, the session stays preserved.
        """
        if self._opened is not None and not self._opened.closed:
            if self._keeper is not None:
                release_outgoing(self._keeper, self._name)
            self._opened.discard()
        self._close_files()

    @exclusively
    def close(self) -> None:
        """Close this process's descriptors of a store that a keeper keeps.

        Raises:
            StoreError: nothing keeps the session, so that its files would be lost (EBUSY).
        """
        if self.closed:
            return
        if self._keeper is None:
            hint = "Nothing keeps its session: detach() it, or discard() the store"
            raise self._error("close", errno.EBUSY, "", hint)
        self._complete()
        if not self._is_kept():
            self._keep()  # the keeper that had it is gone
        self._close()

    def _close(self) -> None:
        if self._opened is not None and not self._opened.closed:
            os.close(self._opened.detach())
        self._close_files()

    @exclusively
    def detach(self) -> int:
        """Return the descriptor of the session without closing it; the caller owns it from now on.

        When the last descriptor of the session is closed, its files are no longer preserved.
        """
        self._complete()
        self.session.fileno()  # raises if the store is closed
        self._close_files()
        return self.session.detach()

    def _close_files(self) -> None:
        self._journal.close()
        if self._waiting is not None:
            self._waiting.close()

    def __del__(self) -> None:
        opened = getattr(self, "_opened", None)
        if opened is None or opened.closed:
            return
        if self._waiting is not None and not self._waiting.closed:
            fd = self._waiting.detach()
            warnings.warn(
                f"{self!r} was dropped in the middle of a renewal; descriptor {fd}, which has its "
                f"files, stays open",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
        with suppress(RequestError):
            if self._is_kept():
                os.close(opened.detach())  # otherwise it stays open, with a warning of its own
        self._journal.close()

    # The keeper has the session, and a parcel with the files of the table; during a renewal, the
    # parcel has the files of the entries too.

    def _keep(self) -> None:
        if self._keeper is None:
            return
        count = sum(len(entry.tokens) for entry in self._contents.entries.values())
        count += len(self._journal.memfds)
        with Parcel.pack(self._files_to_keep(), count) as parcel:
            self._keeper.keep(self._name, label_of_this_boot("table"), parcel)
        self._keeper.keep(self._name, label_of_this_boot("outgoing"), self.session)

    def _files_to_keep(self) -> Iterator[tuple[int, OwnedFd]]:
        for token, memfd in self._journal.memfds.items():
            yield token, OwnedFd(os.dup(memfd.fileno()))
        if self._waiting is not None and not self._waiting.closed:
            for files in self._waiting.unpack():
                for token in list(files):
                    yield token, files.pop(token)

    def _find_kept_session(self) -> OutgoingSession | None:
        """Return the outgoing session of this name that the keeper has."""
        found: OutgoingSession | None = None
        for session in kept_sessions(self._keeper, self._name).values():
            if isinstance(session, OutgoingSession) and found is None:
                found = session
            else:
                os.close(session.detach())  # the keeper still has it
        return found

    def _is_kept(self) -> bool:
        session = self._find_kept_session()
        if session is not None:
            os.close(session.detach())  # the keeper still has it
        return session is not None

    def _resume(self) -> None:
        """Read the table that the keeper has, and complete what was begun."""
        assert self._keeper is not None
        kept = self._keeper.kept(self._name)
        table = kept.pop(label_of_this_boot("table"), None)
        for fd in kept.values():
            fd.close()
        memfds: dict[int, Memfd] = {}
        waiting = False
        if table is not None:
            parcel = Parcel.from_fd(table.detach())
            for files in parcel.unpack():
                for token in list(files):
                    if is_of_table(token):
                        memfds[token] = Memfd(files.pop(token).detach())
                    else:
                        waiting = True
            if waiting:
                self._waiting = parcel
            else:
                parcel.close()
        self._journal = Journal.resume(self._name, _weakly(self._keep), memfds)
        if self._waiting is not None:
            self._refuse_unfinished_store()
            self.complete_renewal()
            release_incoming(self._keeper, self._name)
        elif self._contents.unsettled:
            unsettled = (self._contents.entries[name] for name in self._contents.unsettled)
            unknown = {entry.name: ((0, 0),) * len(entry.tokens) for entry in unsettled}
            self._settle(_Addition(unknown))
            self._tokens.clear()

    def _refuse_unfinished_store(self) -> None:
        """Refuse to complete a renewal if the incoming store has not been finished yet."""
        if find_kept_incoming(self._keeper, self._name) is not None:
            raise self._error(
                "open",
                errno.EBUSY,
                "",
                "A process died while it renewed the incoming store, which still has all files: "
                f"call IncomingStore.retrieve({self._name!r}).renew()",
            )

    def prepare_renewal(
        self,
        entries: Sequence[Entry],
        meta: dict[str, Any],
        files: Iterator[tuple[int, OwnedFd]],
        device: SessionSource | None,
        wait: float,
    ) -> None:
        """Do what `IncomingStore.renew` can do before it finishes the incoming store.

        Args:
            entries: the entries, with their new tokens.
            meta: the metadata of the store.
            files: the file of each token, of which only a few are open at a time.
            device: see `create`.
            wait: see `create`.
        """
        self._begin(device, wait)
        self._journal.catch_up()
        if meta != self._contents.meta:
            self._journal.append(self.session, Meta(None, meta))
        if not self._contents.entries and entries:
            self._journal.append(self.session, Add(tuple(entries)))
        if self._waiting is None:
            count = sum(len(entry.tokens) for entry in entries)
            self._waiting = Parcel.pack(files, count)
        self._keep()

    @exclusively
    def complete_renewal(self) -> None:
        """Preserve the files of an incoming store that `IncomingStore.renew` has finished.

        pyluo's own checks are skipped, because the files were preserved before.
        """
        if self._waiting is None:
            return
        if not self._waiting.closed:
            for files in self._waiting.unpack():
                self._preserve_again(
                    {token: file for token, file in files.items() if not is_of_table(token)}
                )
            self._append(Settle())
            self._waiting.close()
        self._keep()
        self._waiting = None

    def _preserve_again(self, files: Mapping[int, OwnedFd]) -> None:
        """Preserve files by their tokens, except those that an interrupted call has preserved."""
        self._tokens |= {file_id(file.fileno()): token for token, file in files.items()}
        rest = list(files.items())
        while rest:
            try:
                self.session.preserve_many(dict(rest), guarded=False)
                return
            except TokenInUseError as error:  # no other file has this token
                del rest[: len(error.preserved) + 1]


@dataclass(slots=True)
class _Addition:
    """A call of `add` or `add_many`.

    Attributes:
        files: the identities of each new entry's files.
        last_token: the greatest token that the call gave to a file.
        rest: what each entry requires, and its metadata.
    """

    files: dict[str, tuple[FileId, ...]]
    last_token: int = 0
    rest: tuple[Any, ...] = ()

    @classmethod
    def of(cls, new: Sequence[NewEntry]) -> _Addition:
        return cls(
            {
                each.name: tuple(file_id(fileno_of(file)) for file in _files_of(each.file))
                for each in new
            },
            rest=tuple((tuple(each.requires), dict(each.meta or {})) for each in new),
        )

    def same_as(self, other: _Addition) -> bool:
        return (self.files, self.rest) == (other.files, other.rest)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls a method if its object still exists.

    The object may keep the function. A reference to itself would delay the end of a dropped object
    until Python looks for cycles, and its descriptors would be open until then.
    """
    reference = WeakMethod(method)

    def call() -> None:
        if (found := reference()) is not None:
            found()

    return call


def _files_of(file: OwnedFd | int | GuestRam) -> Sequence[OwnedFd | int]:
    return file.memfds if isinstance(file, GuestRam) else [file]
