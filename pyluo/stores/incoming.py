"""`IncomingStore`: named files that the last live update carried over."""

from __future__ import annotations

import dataclasses
import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self, TypeVar, overload

from pyluo import guards
from pyluo.descriptor import OwnedFd, wrap_new_fd
from pyluo.errors import (
    RequestError,
    SessionNotFoundError,
    StoreError,
    TokenNotFoundError,
)
from pyluo.exclusive import exclusively
from pyluo.guest_ram import GuestRam
from pyluo.keepers.choice import choose_keeper
from pyluo.keepers.keeper import KeeperChoice
from pyluo.memfd import Memfd
from pyluo.session import IncomingSession, OutgoingSession
from pyluo.stores.files_in_use import FileId, file_id, files_in_use
from pyluo.stores.journal import TABLE_ROOM, read_contents
from pyluo.stores.kept import (
    find_kept_incoming,
    kept_sessions,
    label_of_this_boot,
    mark_as_finishing,
    release_half_made,
    release_incoming,
)
from pyluo.stores.outgoing import OutgoingStore
from pyluo.stores.store import SessionSource, Store, open_device

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from pyluo.keepers.keeper import Keeper
    from pyluo.stores.entry import Contents, Entry

__all__ = ["IncomingStore"]

_TYPES: dict[str, type[OwnedFd]] = {"memfd": Memfd}

F = TypeVar("F", bound=OwnedFd)


class IncomingStore(Store):
    """Named files that the last live update carried over together.

    `get` returns the files. Then either `renew` carries everything to the next live update, or
    `finish` ends the store. Nothing else destroys what is in it. Every call can be interrupted by
    an exception in a signal handler; the same call again completes it.

    The caller owns the descriptors that `get` returns.

    Args:
        session: an incoming session that was a store in the previous kernel; the object takes it
            over.
        keeper: what keeps the session.

    Raises:
        StoreError: the table of contents is damaged (EBADMSG), newer than this pyluo
            (EPROTONOSUPPORT) or missing (ENOENT). Nothing is finished; the attribute `session` of
            the exception is the open session.
    """

    def __init__(self, session: IncomingSession, keeper: Keeper | None = None) -> None:
        super().__init__(session.name, keeper)
        self._session = session
        self._retrieved: set[str] = set()  # names of entries; retrieving these again cannot fail
        self._files: dict[str, tuple[FileId, ...]] = {}
        self._lost: tuple[str, ...] = ()
        self._next: OutgoingStore | None = None
        self._next_names: tuple[str, ...] = ()
        self._finishing = False
        try:
            self._read: Contents = read_contents(
                lambda token: session.retrieve(token, Memfd, size=TABLE_ROOM)
            )
        except RequestError as error:
            raise self._table_error(error) from error
        self._drop_what_is_lost()
        self._positions = {name: position for position, name in enumerate(self._read.entries)}

    @classmethod
    def retrieve(
        cls,
        name: str,
        *,
        device: SessionSource | None = None,
        wait: float = 0.0,
        keeper: Keeper | KeeperChoice = KeeperChoice.DEFAULT,
    ) -> Self:
        """Retrieve the store of this name that the previous kernel handed over.

        A store that a keeper has, because an earlier process retrieved it and ended, is taken over.

        Args:
            name: the name of the session.
            device: what retrieves the session; by default the keeper, or this process if there is
                no keeper, opens and closes the device.
            wait: for how many seconds to wait while the device is open elsewhere.
            keeper: what keeps the session if this process ends; see `OutgoingStore.create`.

        Raises:
            SessionNotFoundError: there is no such session, or it was finished (ENOENT).
            SessionRetrievedError: another process has retrieved it (EINVAL).
            StoreError: see the class.
            RequestError: see `LiveUpdate`, `LiveUpdate.retrieve_session` and `Keeper.keep`.
        """
        chosen = choose_keeper(keeper)
        session = find_kept_incoming(chosen, name)
        label = label_of_this_boot("incoming")
        try:
            if session is None and chosen is not None and device is None:
                chosen.retrieve(name, label, wait=wait)
                session = find_kept_incoming(chosen, name)
            if session is None:
                with open_device(device, wait) as source:
                    session = source.retrieve_session(name)
                if chosen is not None:
                    chosen.keep(name, label, session)
        except SessionNotFoundError as error:
            kept = kept_sessions(chosen, name).values()
            if any(isinstance(each, OutgoingSession) for each in kept):
                error.hint = f"It was renewed: OutgoingStore.open({name!r}) takes it over"
            for each in kept:
                os.close(each.detach())
            raise
        return cls(session, chosen)

    @property
    def session(self) -> IncomingSession:
        """The session of the store."""
        return self._session

    @property
    def closed(self) -> bool:
        """Whether the store was finished, renewed, closed or detached."""
        return self._session.closed

    @property
    def lost(self) -> tuple[str, ...]:
        """The names of the entries that are missing because the jump interrupted adding them."""
        return self._lost

    @property
    def _contents(self) -> Contents:
        return self._read

    def _drop_what_is_lost(self) -> None:
        """Find out which entries the session lacks: those that were added when the jump came."""
        unsettled = self._read.unsettled
        lost: dict[str, None] = {}
        for entry in list(self._read.entries.values()) if unsettled else ():
            if any(name in lost for name in entry.requires):
                requires = tuple(name for name in entry.requires if name not in lost)
                entry = dataclasses.replace(entry, requires=requires)
                self._read.entries[entry.name] = entry
            if entry.name in unsettled and not self._is_there(entry):
                lost[entry.name] = None
                self._read.remove([entry.name])
        self._lost = tuple(lost)

    def _is_there(self, entry: Entry) -> bool:
        try:
            for file in self._retrieve_files(entry):
                file.close()
        except TokenNotFoundError:
            return False
        except RequestError:
            pass  # the entry exists; get() will raise the same error again
        return True

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

        The entries that this entry requires are retrieved first.

        Args:
            name: the name of the entry.
            type: the class of the object to return; by default `Memfd` for a file that can have
                seals, and `OwnedFd` for others.

        Raises:
            KeyError: there is no such entry.
            TypeError: the entry is a RAM of several files: see `get_ram`.
            PreservedMemoryError: pyluo refuses because the caller's memory cgroup has no room for
                the file (ENOMEM). The file is still in the session.
            RequestError: see `IncomingSession.retrieve`.
        """
        entry = self._read.entries[name]
        if len(entry.tokens) > 1:
            raise TypeError(f"entry {name!r} has {len(entry.tokens)} files: use get_ram()")
        chosen = type or _TYPES.get(entry.kind, OwnedFd)
        [file] = self._retrieve_entry(name)
        return wrap_new_fd(file.detach(), chosen)

    def get_ram(self, name: str) -> GuestRam:
        """Return a RAM that was added as one entry, with new descriptors that the caller closes.

        A NUMA policy that this machine refuses, for example because it has fewer nodes, is left
        out.

        Raises:
            KeyError: there is no such entry.
            TypeError: the entry is no `GuestRam`.
            RequestError: see `get`.
        """
        entry = self._read.entries[name]
        if entry.kind != "ram":
            raise TypeError(f"entry {name!r} is a {entry.kind}, no GuestRam: use get()")
        memfds: list[Memfd] = []
        try:
            for file in self._retrieve_entry(name):
                memfds.append(Memfd(file.detach()))
            try:
                return GuestRam.from_memfds(memfds, entry.state)
            except RequestError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                return GuestRam.from_memfds(memfds)
        except BaseException:
            for memfd in memfds:
                memfd.close()
            raise

    @exclusively
    def _retrieve_entry(self, name: str) -> list[OwnedFd]:
        """Return new descriptors of an entry's files, after retrieving what it requires."""
        entry = self._read.entries[name]
        self._retrieve_required(entry)
        return self._retrieve_files(entry)

    @contextmanager
    def borrow(self, name: str) -> Iterator[list[OwnedFd]]:
        """Return descriptors of an entry's files that the end of the ``with`` block closes.

        Raises:
            KeyError: there is no such entry.
            RequestError: see `get`.
        """
        files = self._retrieve_entry(name)
        try:
            yield files
        finally:
            for file in files:
                file.close()

    def _retrieve_required(self, entry: Entry, *, guarded: bool = True) -> None:
        """Retrieve the entries that an entry requires, and those that these require."""
        needed: set[str] = set()
        pending = list(entry.requires)
        while pending:
            name = pending.pop()
            if name not in needed and name not in self._retrieved:
                needed.add(name)
                pending += self._read.entries[name].requires
        for name in sorted(needed, key=self._positions.__getitem__):
            for file in self._retrieve_files(self._read.entries[name], guarded=guarded):
                file.close()

    def _retrieve_files(self, entry: Entry, *, guarded: bool = True) -> list[OwnedFd]:
        """Return new descriptors of the files of an entry.

        Args:
            entry: the entry.
            guarded: whether to check that the cgroup has room for it.
        """
        if guarded and entry.name not in self._retrieved:
            guards.refuse_full_cgroup(
                entry.size, lambda: f"store {self._name!r}, entry {entry.name!r}"
            )
        files: list[OwnedFd] = []
        try:
            for token in entry.tokens:
                files.append(self._session.retrieve(token, OwnedFd, size=0))  # see above
            self._files[entry.name] = tuple(file_id(file.fileno()) for file in files)
            self._retrieved.add(entry.name)
        except BaseException:
            for file in files:
                file.close()
            raise
        return files

    @exclusively
    def finish(self, *, destroy: Collection[str] = ()) -> None:
        """Finish the store: end its session, which destroys every file that nobody has open.

        The call refuses to destroy an entry that is not named: an entry is safe if this process has
        its files open or mapped. The kernel finishes the last entry first. Finishing a store twice
        does nothing.

        Args:
            destroy: the names of entries that may be destroyed, or whose files another process has
                open.

        Raises:
            StoreError: entries that are not in `destroy` would be destroyed (EBUSY); a name in
                `destroy` is not in the store (ENOENT); or a renewal was interrupted (EBUSY), which
                `renew` completes. Nothing is finished in these cases.
            RequestError: see `IncomingSession.finish`.
        """
        if not self._session.closed:
            self._refuse_if_renewed("finish")
            self._check_names("finish", destroy)
            in_use, destroyed = files_in_use(), set(destroy)
            if left := [
                name
                for name in self._read.entries
                if name not in destroyed
                and not in_use.issuperset(self._files.get(name, (_NO_FILE,)))
            ]:
                raise self._error(
                    "finish",
                    errno.EBUSY,
                    f"entries {left}, which this process has neither open nor mapped",
                    f"They would be destroyed: get() them, or call finish(destroy={left})",
                )
            if self._next is not None:
                self._next.discard()
                self._next = None
            release_half_made(self._keeper, self._name)
            self._finish_session()
        release_incoming(self._keeper, self._name)

    def _finish_session(self) -> None:
        if not self._session.closed:
            mark_as_finishing(self._keeper, self._name)
        self._session.finish()

    def _refuse_if_renewed(self, operation: str) -> None:
        if self._finishing:
            hint = "renew() has finished it already: call it again, with the same arguments"
            raise self._error(operation, errno.EBUSY, "", hint)

    @exclusively
    def renew(
        self,
        *,
        destroy: Collection[str] = (),
        device: SessionSource | None = None,
        wait: float = 0.0,
        allow_noexec: bool = False,
    ) -> OutgoingStore:
        """Preserve all entries for the next live update, with the same names and order.

        Retrieve all files, create an outgoing session with a table of contents, finish this store,
        and preserve the files in the new session. Between the last two steps, only this process and
        the keeper have the files.

        Args:
            destroy: the names of entries that are not preserved again, and so are destroyed unless
                somebody has their files open.
            device: what creates the session; by default the call opens and closes the device.
            wait: see `retrieve`.
            allow_noexec: see `OutgoingSession.preserve`.

        Returns:
            The outgoing store. This store is finished.

        Raises:
            StoreError: an entry to destroy does not exist (ENOENT), or another entry requires it
                (EBUSY).
            PreservedMemoryError: files have grown since they were retrieved, and there is too
                little memory to preserve them (ENOMEM).
            RequestError: a file could not be retrieved, and another call can name the entry in
                `destroy`; or the session could not be created. Nothing is finished then. Or a file
                could not be preserved: this store still has all files, and the same call again
                goes on.
        """
        kept = self._entries_without(destroy)
        if self._next is not None and self._next_names != tuple(kept):
            self._refuse_if_renewed("renew")
            self._next.discard()
            self._next = None
        if not self._finishing:
            self._prepare_renewal(list(kept.values()), device, wait, allow_noexec)
        assert self._next is not None
        self._finish_for_renewal()
        self._next.complete_renewal()
        release_incoming(self._keeper, self._name)
        return self._next

    def _prepare_renewal(
        self,
        entries: Sequence[Entry],
        device: SessionSource | None,
        wait: float,
        allow_noexec: bool,
    ) -> None:
        if self._next is None:
            release_half_made(self._keeper, self._name)
            self._next_names = tuple(entry.name for entry in entries)
            self._next = OutgoingStore(self._name, self._keeper)
        renumbered = list(_renumber(entries))
        files = self._files_to_renew(entries, renumbered, allow_noexec)
        try:
            self._next.prepare_renewal(renumbered, self._read.meta, files, device, wait)
        except RequestError:
            self._next.discard()
            self._next = None
            raise

    def _files_to_renew(
        self, entries: Sequence[Entry], renumbered: Sequence[Entry], allow_noexec: bool
    ) -> Iterator[tuple[int, OwnedFd]]:
        """Yield the file of each new token; refuse files that could not be preserved again.

        Files that have not grown take no additional memory.
        """
        missing = [entry.size for entry in entries if entry.name not in self._retrieved]
        guards.refuse_full_cgroup(sum(missing), lambda: f"store {self._name!r}, all entries")
        demand = guards.MemoryDemand()
        for entry, new in zip(entries, renumbered, strict=True):
            self._retrieve_required(entry, guarded=False)
            retrieved = self._retrieve_files(entry, guarded=False)
            for token, file in zip(new.tokens, retrieved, strict=True):
                noexec = demand.add([file.fileno()])
                if noexec is not None and not allow_noexec:
                    raise guards.noexec_error(f"store {self._name!r}, entry {entry.name!r}")
                yield token, file
        demand.refuse_excess(lambda: f"store {self._name!r}", in_scratch=False)

    def _finish_for_renewal(self) -> None:
        self._finishing = True
        try:
            self._finish_session()
        except RequestError:
            self._finishing = False
            raise

    def _entries_without(self, names: Collection[str]) -> dict[str, Entry]:
        """Return the entries not in `names`; raise if one of these requires a name in `names`."""
        self._check_names("renew", names)
        left = set(names)
        kept = {name: entry for name, entry in self._read.entries.items() if name not in left}
        for entry in kept.values():
            if needed := left.intersection(entry.requires):
                raise self._error(
                    "renew",
                    errno.EBUSY,
                    f"entries {sorted(needed)}",
                    f"Entry {entry.name!r} requires them",
                )
        return kept

    def _check_names(self, operation: str, names: Collection[str]) -> None:
        if unknown := [name for name in names if name not in self._read.entries]:
            raise self._error(
                operation, errno.ENOENT, f"entries {unknown}", f"The store has {list(self)}"
            )

    @exclusively
    def close(self) -> None:
        """Close this process's descriptor of a session that a keeper keeps.

        Raises:
            StoreError: nothing keeps the session, so that its files would be lost (EBUSY).
        """
        if self._session.closed:
            return
        if self._keeper is None:
            hint = "Nothing keeps its session: detach() it, or finish() the store"
            raise self._error("close", errno.EBUSY, "", hint)
        self._refuse_if_renewed("close")
        if not self._is_kept():  # the keeper that had it is gone
            self._keeper.keep(self._name, label_of_this_boot("incoming"), self._session)
        os.close(self._session.detach())

    def _is_kept(self) -> bool:
        session = find_kept_incoming(self._keeper, self._name)
        if session is not None:
            os.close(session.detach())  # the keeper still has it
        return session is not None

    @exclusively
    def detach(self) -> int:
        """Return the descriptor of the session without closing it; the caller owns it from now on.

        When the last descriptor of the session is closed, the files that were not retrieved are
        destroyed.
        """
        return self._session.detach()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is None or session.closed or self._keeper is None:
            return
        with suppress(RequestError):
            if self._is_kept():
                os.close(session.detach())  # otherwise it stays open, with a warning of its own

    def _table_error(self, error: RequestError) -> StoreError:
        """Return the exception for a table that cannot be read, with the session in `session`."""
        number, hint = error.errno or errno.EIO, error.hint
        if isinstance(error, TokenNotFoundError):
            what = "no table of contents"
        elif isinstance(error, StoreError):
            what = f"its table: {error.subject}"
        else:
            what = f"its table: {error}"
        refusal = self._error("retrieve", number, what, hint)
        refusal.session = self._session
        self._keeper = None  # the session is the exception's now: `__del__` must not close it
        return refusal


_NO_FILE: FileId = (-1, -1)


def _renumber(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the entries with new tokens, from 1 on."""
    token = 1
    for entry in entries:
        tokens = tuple(range(token, token + len(entry.tokens)))
        token += len(tokens)
        yield dataclasses.replace(entry, tokens=tokens)
