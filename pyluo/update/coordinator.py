"""`Coordinator`: updates the host's kernel when all VMs are stored, or lets all of them run on."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyluo._sys import constant
from pyluo.errors import RequestError
from pyluo.handoff import listen
from pyluo.operation import Operation
from pyluo.peer import Packet, peer_credentials, same_user
from pyluo.update.host import Host
from pyluo.update.messages import (
    JUMP,
    VERSION,
    Abort,
    Answer,
    CreateSession,
    Done,
    Hello,
    Jump,
    Message,
    Prepare,
    Progress,
    Ready,
    RetrieveSession,
    Running,
    Status,
    Unable,
    Update,
    Welcome,
    decode,
    encode,
)
from pyluo.update.participant import SOCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    # What happened: seconds since the update began, the participant or "", and a text.
    Report = Callable[[float, str, str], None]

__all__ = ["Coordinator", "UpdateAborted"]

_UPDATE = Operation("update")
_NAME_LIMIT = constant("LIVEUPDATE_SESSION_NAME_LENGTH") - 1
_BACKLOG = 128  # VMMs that connect at the same time


class UpdateAborted(Exception):
    """There was no jump; all VMs that could be told run on."""


@dataclass(eq=False, slots=True)
class _Member:
    """A participant, or a program that is not one yet.

    Attributes:
        connection: the connection to it.
        name: the name of its VM; empty before its "hello".
        ready: the number of the round that it was last ready for.
        sessions: the sessions that have its VM then.
        unable: why it cannot be stored in the present round.
        running: the number of the round after whose end it has said that it runs.
        gone: whether the connection has ended.
        update: the update that it has asked for, if any.
    """

    connection: socket.socket
    name: str = ""
    ready: int = 0
    sessions: list[str] = field(default_factory=list)
    unable: str = ""
    running: int = 0
    gone: bool = False
    update: asyncio.Task[None] | None = None


class Coordinator:
    """Waits for VMMs, and updates the host's kernel when it is told to.

    Args:
        host: what does the work on the host; by default the host itself.
        log: is called with a line about each participant that comes, goes or is refused.
    """

    def __init__(self, host: Host | None = None, log: Callable[[str], None] = print) -> None:
        self._host = Host() if host is None else host
        self._log = log
        self._members: dict[str, _Member] = {}
        self._round = 0
        self._preparing: Prepare | None = None
        self._began = 0.0
        self._limit = 0.0
        self._changed = asyncio.Event()
        self._updating = False
        self._jumping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._last: dict[str, Any] | None = None

    async def serve(self, path: str | os.PathLike[str] = SOCKET) -> None:
        """Wait for participants, until the task is cancelled.

        Args:
            path: the path of the socket.

        Raises:
            HandoffError: see `handoff.listen`.
        """
        loop = asyncio.get_running_loop()
        try:
            self._last = await asyncio.to_thread(self._host.last)
        except RequestError as error:
            self._log(f"no record of an update before: {error}")
        for failure in self._failures_of_network():
            self._log(failure)
        await self._forget()  # what a coordinator has left that died on this kernel
        with listen(path, timeout=0, backlog=_BACKLOG) as listener:
            self._log(f"listening at {os.fspath(path)}")
            try:
                while True:
                    connection, _ = await loop.sock_accept(listener)
                    self._start(self._talk(connection))
            finally:
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def participants(self) -> tuple[str, ...]:
        """The names of the VMs that take part."""
        return tuple(sorted(self._members))

    async def update(
        self,
        *,
        limit: float,
        dry_run: bool = False,
        expected: Sequence[str] = (),
        report: Report = lambda *_: None,
    ) -> None:
        """Pause and store all VMs, and jump into the image that is loaded.

        After a jump this does not return.

        Args:
            limit: seconds for all to be ready.
            dry_run: whether to let all run on once they are ready.
            expected: the names of participants without which there is no update.
            report: is called with what happens.

        Raises:
            UpdateAborted: there was no jump, and why; the VMs run on.
            RequestError: another update is under way (EBUSY); no image is loaded (EINVAL).
        """
        if self._updating:
            raise _UPDATE.error(errno.EBUSY, "this host", "Another update is under way")
        self._updating = True
        try:
            self._began = time.monotonic()
            await asyncio.to_thread(self._host.check)
            if missing := [name for name in expected if name not in self._members]:
                raise UpdateAborted(f"{', '.join(missing)}: not there")
            self._round += 1
            self._limit = limit
            try:
                await self._prepare(dry_run, report)
                if not dry_run:
                    await self._jump(report)
            except Exception as error:  # whatever it is, nobody must wait for ever
                reason = str(error) or repr(error)
                await self._let_run(reason, report)
                await self._forget()
                raise UpdateAborted(reason) from error
            except asyncio.CancelledError:
                # systemd ends this process before it jumps: then nobody must run on.
                if not self._jumping:
                    self._abort("the coordinator was told to end")
                raise
            await self._let_run("a dry run", report)
        finally:
            self._updating = False

    async def _forget(self) -> None:
        try:
            await asyncio.to_thread(self._host.forget)
        except Exception as error:
            self._log(f"the record of the update is still there: {error}")

    async def _prepare(self, dry_run: bool, report: Report) -> None:
        """Have all prepare, also those who come meanwhile; return with all of them ready.

        When this returns, it is certain that nobody else has come.
        """
        self._preparing = Prepare(round=self._round, limit=self._limit, dry_run=dry_run)
        for member in list(self._members.values()):
            member.unable, member.sessions = "", []
            self._send(member, self._preparing)
        told: set[str] = set()
        while True:
            await self._wait_until_ready(told, report)
            # Also of a VM whose VMM has died since it was ready.
            sessions = [name for member in self._members.values() for name in member.sessions]
            await asyncio.to_thread(self._host.require, sessions)
            if not dry_run:
                members = {name: member.sessions for name, member in self._members.items()}
                record = {"participants": members, "jump": time.time(), "ready": self._seconds()}
                for each in await asyncio.to_thread(self._host.record, record):
                    report(self._seconds(), "", f"not carried over: {each}")
            if not self._unready():
                return

    async def _wait_until_ready(self, told: set[str], report: Report) -> None:
        until = self._began + self._limit
        while True:
            self._changed.clear()
            for name, member in self._members.items():
                if member.unable:
                    raise UpdateAborted(f"{name}: {member.unable}")
                if member.ready == self._round and name not in told:
                    told.add(name)
                    report(self._seconds(), name, "ready")
            if not (unready := self._unready()):
                return
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                names = ", ".join(unready)
                raise UpdateAborted(f"{names}: not ready within {self._limit:g} s") from None

    def _unready(self) -> list[str]:
        return [name for name, each in self._members.items() if each.ready != self._round]

    async def _jump(self, report: Report) -> None:
        self._jumping = True
        try:
            for member in self._members.values():
                self._send(member, Jump(round=self._round))
            report(self._seconds(), "", JUMP)
            await asyncio.sleep(await asyncio.to_thread(self._host.jump))
            raise UpdateAborted("systemd has not jumped")
        except Exception:
            self._jumping = False
            raise

    def _abort(self, reason: str) -> list[_Member]:
        """Tell all to run on; return those who were told."""
        self._preparing = None
        members = [member for member in self._members.values() if not member.gone]
        for member in members:
            self._send(member, Abort(round=self._round, reason=reason))
        self._members = {member.name: member for member in members}
        return members

    async def _let_run(self, reason: str, report: Report) -> None:
        """Let all VMs run on, and wait until they say so."""
        waiting = self._abort(reason)
        try:
            async with asyncio.timeout(self._limit):
                while waiting:
                    self._changed.clear()
                    for member in waiting:
                        if member.running == self._round:
                            report(self._seconds(), member.name, "runs on")
                    waiting = [
                        each for each in waiting if each.running != self._round and not each.gone
                    ]
                    if waiting:
                        await self._changed.wait()
        except TimeoutError:
            for member in waiting:
                report(self._seconds(), member.name, "does not say that it runs on")

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    # The connections

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _talk(self, connection: socket.socket) -> None:
        """Do what the other end of a connection asks for, until it ends."""
        member = _Member(connection)
        try:
            peer = peer_credentials(connection)
            if not same_user(peer):
                self._log(f"{peer} is refused: it is neither of this user nor root")
                return
            connection.setblocking(False)
            while (message := await self._receive(connection)) is not None:
                await self._answer(member, message)
        except (RequestError, OSError) as error:
            self._log(f"{member.name or 'a program'}: {error}")
        finally:
            self._leave(member)

    def _leave(self, member: _Member) -> None:
        member.connection.close()
        member.gone = True
        if member.update is not None and not self._jumping:
            member.update.cancel()
        if self._members.get(member.name) is member:
            self._log(f"{member.name} has left")
            if self._preparing is not None and member.ready != self._round:
                member.unable = "it left before it was ready"
            elif self._preparing is None:
                del self._members[member.name]
        self._changed.set()

    async def _answer(self, member: _Member, message: Message) -> None:
        match message:
            case Hello():
                self._welcome(member, message)
            case Ready() | Unable() if message.round != self._round:
                pass  # it is too late, and gets an "abort"
            case Ready(sessions=[]):
                member.unable = "it names no session that has its VM"
            case Ready():
                member.sessions = message.sessions
                member.ready = message.round
            case Unable():
                member.unable = message.reason or "it gives no reason"
            case Running():
                member.running = message.round
            case CreateSession() | RetrieveSession():
                await self._give_session(member, message)
            case Update():
                if member.update is not None and not member.update.done():
                    raise _UPDATE.error(errno.EBUSY, "this host", "It asks for two updates")
                member.update = self._start(self._run_update(member, message))
            case Status():
                self._tell_status(member)
            case _:
                raise _UPDATE.error(errno.EPROTO, member.name, f"It says {message}")
        self._changed.set()

    def _welcome(self, member: _Member, hello: Hello) -> None:
        if not 0 < len(os.fsencode(hello.name)) <= _NAME_LIMIT:
            hint = f"The name of a VM has 1 to {_NAME_LIMIT} bytes, as that of a session"
            raise _UPDATE.error(errno.EINVAL, "hello", hint)
        other = self._members.get(hello.name)
        if member.name or (other is not None and not other.gone):
            hint = f"Another participant is called {hello.name!r}, or it has two names"
            raise _UPDATE.error(errno.EEXIST, "hello", hint)
        if self._jumping:
            raise _UPDATE.error(errno.EBUSY, "hello", "The host jumps now, without this VM")
        member.name = hello.name
        self._members[hello.name] = member
        self._log(f"{hello.name} takes part")
        self._send(member, Welcome(version=VERSION))
        if hello.paused is not None:
            self._note_resumption(hello.name, hello.paused)
        if self._preparing is not None:
            left = max(self._began + self._limit - time.monotonic(), 0.1)
            prepare = Prepare(round=self._round, limit=left, dry_run=self._preparing.dry_run)
            self._send(member, prepare)
        elif hello.stored:
            self._send(member, Abort(round=self._round, reason="no update is under way"))

    def _note_resumption(self, name: str, paused: float) -> None:
        if self._last is not None and name in self._last["participants"]:
            resumed = self._last.setdefault("resumed", {})
            resumed[name] = {"paused": paused, "after": time.time() - self._last["jump"]}
            self._log(f"{name} is resumed: paused for {paused:.3f} s")

    async def _give_session(
        self, member: _Member, request: CreateSession | RetrieveSession
    ) -> None:
        name = request.name
        try:
            if not member.name or (name != member.name and not name.startswith(f"{member.name}.")):
                hint = f"It is not called {member.name!r}, nor begins with that and a dot"
                raise _UPDATE.error(errno.EACCES, f"session {name!r}", hint)
            give = (
                self._host.create_session
                if isinstance(request, CreateSession)
                else self._host.retrieve_session
            )
            session = await asyncio.to_thread(give, name)
        except RequestError as error:
            number = error.errno or errno.EIO
            self._send(member, Answer(errno=number, text=error.hint or str(error)))
            return
        fd = session.detach()
        try:
            self._send(member, Answer(errno=0, text=""), [fd])
        finally:
            os.close(fd)

    async def _run_update(self, member: _Member, wanted: Update) -> None:
        """Update the host for a program that has asked for it, and tell it what happens."""

        def report(seconds: float, name: str, text: str) -> None:
            self._log(f"{seconds:.3f} s {name} {text}")
            self._send(member, Progress(seconds=seconds, name=name, text=text))

        failure = ""
        try:
            for _ in range(wanted.rounds if wanted.dry_run else 1):
                await self.update(
                    limit=wanted.limit,
                    dry_run=wanted.dry_run,
                    expected=wanted.expected,
                    report=report,
                )
        except Exception as error:
            failure = str(error) or repr(error)
        self._send(member, Done(failure=failure))

    def _failures_of_network(self) -> list[str]:
        """Return what could not be made again of the network, in words."""
        failures: list[str] = (self._last or {}).get("network", [])
        return failures

    def _tell_status(self, member: _Member) -> None:
        last = self._last or {"participants": {}}
        resumed = last.get("resumed", {})
        for name in sorted({*self._members, *last["participants"]}):
            text = "takes part" if name in self._members else "is not there"
            if name in resumed:
                text += f", was paused for {resumed[name]['paused']:.3f} s by the last update"
            elif name in last["participants"]:
                text += ", has not been resumed since the last update"
            self._send(member, Progress(seconds=0.0, name=name, text=text))
        for failure in self._failures_of_network():
            self._send(member, Progress(seconds=0.0, name="", text=failure))
        self._send(member, Done(failure=""))

    def _send(self, member: _Member, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message without waiting: who does not read its messages is taken for gone."""
        if member.gone:
            return
        try:
            socket.send_fds(member.connection, [encode(message)], list(fds), socket.MSG_NOSIGNAL)
        except OSError as error:
            self._log(f"{member.name or 'a program'} cannot be told {message}: {error}")
            with suppress(OSError):
                member.connection.shutdown(socket.SHUT_RDWR)  # which ends `_talk`

    async def _receive(self, connection: socket.socket) -> Message | None:
        loop = asyncio.get_running_loop()
        while True:
            packet = Packet()
            result = packet.receive(connection.fileno())
            if result != -errno.EAGAIN:
                break
            readable = asyncio.Event()
            loop.add_reader(connection, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(connection)
        for file in packet.files:  # nobody sends any
            file.close()
        return decode(packet.data) if result > 0 else None
