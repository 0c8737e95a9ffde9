"""The two drivers of a handoff through a socket: one that blocks, and one for asyncio.

They share everything but the waiting: `Conversation` moves packets between a machine and a socket
without ever blocking, and says what to wait for.
"""

from __future__ import annotations

import enum
import math
import os
import select
import socket
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from errno import (
    EAGAIN,
    ECANCELED,
    ECONNREFUSED,
    ECONNRESET,
    EDEADLK,
    ENOPROTOOPT,
    ENOTCONN,
    EOPNOTSUPP,
    EPIPE,
    ESRCH,
    ETIMEDOUT,
    EWOULDBLOCK,
)
from typing import TYPE_CHECKING

from pyluo._sys import PacketBuffer
from pyluo.descriptor import OwnedFd
from pyluo.errors import HandoffError
from pyluo.handoff.machine import Owner, Phase
from pyluo.peer import Packet, peer_credentials

if TYPE_CHECKING:
    from pyluo.handoff.machine import Machine
    from pyluo.handoff.packets import Outgoing

__all__ = ["TIMEOUT", "Conversation", "check_socket"]

TIMEOUT = 10.0
"""How long to wait for a packet, in seconds, unless the caller says otherwise."""

# include/uapi/asm-generic/socket.h, Linux 6.5; Python's socket module does not have it.
_SO_PASSPIDFD = 76
_CLOSED = (-EPIPE, -ECONNRESET, -ENOTCONN, -ECONNREFUSED)
_AGAIN = (-EAGAIN, -EWOULDBLOCK)


class _Wait(enum.Enum):
    """What a conversation waits for, besides the death of the other process."""

    PACKET = enum.auto()
    ROOM = enum.auto()
    DEATH = enum.auto()


class Conversation:
    """One side of a handoff, over a connection.

    The conversation has a duplicate of the connection's descriptor, so that closing the connection
    does not look like a death to the other side while it is undecided who owns the files. Only one
    thread at a time may use the object.
    """

    def __init__(self, machine: Machine, connection: socket.socket) -> None:
        self._machine = machine
        self._process = os.getpid()
        self._inbox = Packet()
        self._outbox: tuple[Outgoing, PacketBuffer] | None = None
        self._pidfd = OwnedFd(-1)
        self._begun = False
        self._unconfirmed: Packet | None = None  # by whose PID the pidfd was opened
        self._gone = False  # whether there was no process to open a pidfd of any more
        self._options: dict[int, int] = {}
        with machine.operation.raising(machine.subject):
            self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    @property
    def owner(self) -> Owner:
        """Who may use the files: the sender, the receiver, or `Owner.UNDECIDED`.

        This can be asked after any exception.
        """
        self._settle()
        return self._machine.owner

    def _settle(self) -> None:
        """Tell the machine of a packet that was sent just before an exception."""
        if self._outbox is not None and self._outbox[1].sent:
            self._machine.sent(self._outbox[0])

    # Steps, which both drivers share

    def _begin(self) -> None:
        """Ask the kernel to tell who sends the packets, and check who created the other end."""
        if os.getpid() != self._process:
            hint = f"Process {self._process} began it, and only that one may go on"
            raise HandoffError(EDEADLK, self._machine.operation.name, self._machine.subject, hint)
        self._settle()
        if self._machine.done or self._machine.awaits_death:
            return
        self._begun = True
        with self._machine.operation.raising(self._machine.subject):
            for option in (_SO_PASSPIDFD, socket.SO_PASSCRED):
                self._set_option(option)
            creator = peer_credentials(self._socket)
        self._machine.meet(creator)

    def _set_option(self, option: int) -> None:
        try:
            before = self._socket.getsockopt(socket.SOL_SOCKET, option)
            self._options.setdefault(option, before)
            self._socket.setsockopt(socket.SOL_SOCKET, option, 1)
        except OSError as error:
            if error.errno != ENOPROTOOPT:  # Linux before 6.5 sends no pidfds
                raise

    def _step(self) -> _Wait | None:
        """Send and receive what can be without waiting.

        Returns:
            What to wait for; None if the machine is done.
        """
        machine = self._machine
        while not machine.done:
            if machine.phase is Phase.GIVING_UP:
                self._send_refusal()
                if machine.phase is Phase.GIVING_UP:
                    return _Wait.ROOM
            elif machine.awaits_death:
                if not self._peer_is_dead():
                    return _Wait.DEATH
                machine.peer_died()
            elif machine.pending is not None:
                if not self._send(machine.pending):
                    return _Wait.ROOM
            elif not self._receive():
                return _Wait.PACKET
        return None

    def _send(self, packet: Outgoing) -> bool:
        """Send the pending packet; return whether there was room for it."""
        result = self._put(packet)
        dead = result in _AGAIN and self._peer_is_dead()
        if result in _AGAIN and not dead:
            return False
        if result >= 0:
            self._machine.sent(packet)
        elif dead or result in _CLOSED:
            self._machine.cannot_send(packet)  # it may have said why, before
        else:
            self._machine.cannot_go_on(
                self._machine.operation.error(-result, self._machine.subject)
            )
        return True

    def _send_refusal(self) -> None:
        """Tell the other side that this side has given up, if there is room for that."""
        packet = self._machine.pending
        assert packet is not None
        result = self._put(packet)
        if result >= 0:
            self._machine.sent(packet)
        elif result in _CLOSED:
            self._machine.cannot_send(packet)
        else:
            self._machine.refusal_is_lost()
            if self._peer_is_dead():
                self._machine.peer_died()

    def _put(self, packet: Outgoing) -> int:
        if self._outbox is None or self._outbox[0] is not packet:
            self._outbox = packet, PacketBuffer(packet.data, packet.fds)
        return self._outbox[1].send(self._socket.fileno())

    def _receive(self) -> bool:
        """Receive a packet, or the end of the connection; return False if there is neither yet."""
        dead = False
        result = self._fill_inbox()
        if result in _AGAIN and self._peer_is_dead():
            dead = True
            result = self._fill_inbox()  # what it sent before it died
        if result in _AGAIN and not dead:
            return False
        if result <= 0:
            if result < 0 and result not in (*_AGAIN, *_CLOSED):
                with self._machine.operation.raising(self._machine.subject):
                    raise OSError(-result, os.strerror(-result))
            self._machine.hung_up(dead=dead or self._peer_is_dead())
            return True
        try:
            self._machine.receive(self._inbox)
        except HandoffError as error:
            self._machine.give_up(error)
            self._accept_inbox()
            if self._machine.phase is not Phase.GIVING_UP:
                error.unfinished = self
                raise
        self._accept_inbox()
        return True

    def _fill_inbox(self) -> int:
        if self._inbox is self._machine.last:
            self._accept_inbox()
        result = self._inbox.receive(self._socket.fileno())
        if result == -ECONNRESET:
            # The other side closed the socket before it had read all packets. The kernel reports
            # this once; receiving again returns the reason that the other side sent.
            result = self._inbox.receive(self._socket.fileno())
        return result

    def _accept_inbox(self) -> None:
        """Make room for the next packet, after the machine has looked at the last one."""
        packet = self._inbox
        accepted = packet is self._machine.last
        if accepted:
            self._learn_pidfd(packet)
        if not accepted or not self._machine.keeps_files:
            packet.close()
        self._inbox = Packet()

    # The death of the other process

    def _learn_pidfd(self, packet: Packet) -> None:
        """Get a pidfd of the sender of a packet, unless there is one already.

        Where the kernel sends none along, one is opened by the PID in the packet. The process may
        have died since, and another one may have got its PID. So the pidfd counts only after one
        more packet has come from that PID: then the process was alive when the pidfd was opened.
        """
        if not self._pidfd.closed:
            if packet is not self._unconfirmed:
                self._unconfirmed = None
        elif packet.has_pidfd:
            packet.move_pidfd(self._pidfd)
        elif self._machine.peer is not None and self._machine.peer.pid:
            self._unconfirmed = packet
            try:
                self._pidfd = OwnedFd(os.pidfd_open(self._machine.peer.pid))
            except OSError as error:
                self._gone = error.errno == ESRCH
        packet.close_pidfd()

    def _peer_is_dead(self) -> bool:
        """Return whether all threads of the other process are known to have ended."""
        if self._gone:
            return True
        if not self._has_proof:
            return False
        poll = select.poll()
        poll.register(self._pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    @property
    def _has_proof(self) -> bool:
        """Whether there is a pidfd that is known to be the other process's."""
        return not self._pidfd.closed and self._unconfirmed is None

    # The two drivers

    def _run(self, timeout: float | None, deadline: float | None, *, patient: bool = False) -> None:
        """Drive the machine until it is done, and block meanwhile.

        Args:
            timeout: seconds to wait for each event; None for no limit.
            deadline: seconds to wait for all of them together; None for no limit.
            patient: whether to wait for room to tell the other side that this side gives up.

        Raises:
            HandoffError: why it has failed, or is undecided; `unfinished` is set then.
            ValueError: a time is not above zero.
        """
        clock = _Clock(timeout, deadline)
        self._begin_or_give_up()
        while (wait := self._step()) is not None:
            if self._machine.phase is Phase.GIVING_UP and not patient:
                break
            if not self._wait(wait, clock.left()):
                self._time_is_up(clock)
                break
        self._end()

    async def _run_async(
        self, timeout: float | None, deadline: float | None, *, patient: bool = False
    ) -> None:
        """Drive the machine until it is done, in the running asyncio event loop; see `_run`."""
        clock = _Clock(timeout, deadline)
        self._begin_or_give_up()
        while (wait := self._step()) is not None:
            if self._machine.phase is Phase.GIVING_UP and not patient:
                break
            if not await self._wait_async(wait, clock.left()):
                self._time_is_up(clock)
                break
        self._end()

    def _wait(self, wait: _Wait, seconds: float | None) -> bool:
        """Block until something may have happened; return False if the time is up."""
        poll = select.poll()
        if wait is not _Wait.DEATH:
            event = select.POLLIN if wait is _Wait.PACKET else select.POLLOUT
            poll.register(self._socket.fileno(), event)
        if self._has_proof:
            poll.register(self._pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(None if seconds is None else math.ceil(seconds * 1000)))

    async def _wait_async(self, wait: _Wait, seconds: float | None) -> bool:
        """Let the event loop run until something may have happened; see `_wait`."""
        import asyncio  # here, because importing it takes long, and only its users need it

        loop = asyncio.get_running_loop()
        happened = asyncio.Event()
        number, pidfd = self._socket.fileno(), -1
        try:
            if wait is _Wait.PACKET:
                loop.add_reader(number, happened.set)
            elif wait is _Wait.ROOM:
                loop.add_writer(number, happened.set)
            if self._has_proof:
                pidfd = self._pidfd.fileno()
                loop.add_reader(pidfd, happened.set)
            async with asyncio.timeout(seconds):
                await happened.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(number)
            loop.remove_writer(number)
            if pidfd >= 0:
                loop.remove_reader(pidfd)
        return True

    def _begin_or_give_up(self) -> None:
        try:
            self._begin()
        except HandoffError as error:
            self._machine.give_up(error)
            if self._machine.error is not error:
                raise

    def _time_is_up(self, clock: _Clock) -> None:
        machine = self._machine
        if machine.awaits_death:
            return  # it is as undecided as it was
        error = machine.operation.error(ETIMEDOUT, machine.subject)
        if clock.expired:
            error.hint = f"The handoff as a whole took longer than {clock.deadline} seconds"
        machine.cannot_go_on(error)
        self._step()

    def _end(self) -> None:
        """Close what is no longer needed, if the machine is done; raise its error if it has one."""
        machine = self._machine
        if machine.phase is Phase.FAILED:
            # The other side must not wait, and packets in flight must not be taken for the
            # beginning of another conversation.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if machine.phase in (Phase.DONE, Phase.FAILED):
            self._close()
            if machine.error is not None:
                raise machine.error
            return
        error = machine.error or machine.undecided_error()
        error.unfinished = self
        raise error

    def _close(self) -> None:
        for option, before in self._options.items():
            with suppress(OSError):  # the descriptor is closed, if this is the second call
                self._socket.setsockopt(socket.SOL_SOCKET, option, before)
        self._inbox.close()
        self._socket.close()
        self._pidfd.close()
        self._machine.close()

    def abandon(self, reason: BaseException | None = None) -> None:
        """Leave the files to the sender, tell the other side why, and end the connection.

        On the receiver's side, this closes all descriptors that have come. If the sender is dead,
        they may be the last ones of their files. This does nothing after a handoff that succeeded
        or failed.

        Args:
            reason: an exception, whose words the other side gets.

        Raises:
            HandoffError: this is the sender, and it is too late: the receiver may use the files.
        """
        machine = self._machine
        self._give_up(reason)
        self._step()
        try:
            self._end()
        except HandoffError:
            if machine.phase is not Phase.FAILED:
                raise

    def stop(self, error: BaseException) -> None:
        """End a handoff that nobody can go on with, because an exception leaves the call.

        Those who catch a `HandoffError` with `unfinished` can go on.
        """
        if not self._begun:
            self._close()
        elif getattr(error, "unfinished", None) is not self and self._socket.fileno() >= 0:
            self._drop(error)

    def _give_up(self, reason: BaseException | None = None) -> None:
        """Give up, unless the packet that makes it too late for that was sent already."""
        self._settle()
        hint = "It was abandoned"
        self._machine.give_up(
            reason or HandoffError(ECANCELED, self._machine.operation.name, "", hint)
        )

    def _require_proof(self) -> None:
        """Raise HandoffError (EOPNOTSUPP) if the death of the other process cannot be seen."""
        if self._gone or self._has_proof:
            return
        hint = (
            "The kernel gave no pidfd of it (Linux 6.5 and newer send one with each packet), and "
            "its PID could not be used instead, so that its death cannot be proved"
        )
        raise HandoffError(EOPNOTSUPP, self._machine.operation.name, self._machine.subject, hint)

    def __del__(self) -> None:
        if not hasattr(self, "_socket") or self._socket.fileno() < 0:
            return
        if self._process != os.getpid() or not self._begun:
            self._socket.close()
            self._machine.close()
            return
        try:
            warnings.warn(
                f"{type(self).__name__} was dropped before the handoff was decided",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
        finally:
            self._drop()

    def _drop(self, error: BaseException | None = None) -> None:
        """Give the handoff up, as far as that loses nothing, and forget it."""
        with suppress(HandoffError):
            self.abandon(error)
        self._close()


@dataclass(slots=True)
class _Clock:
    """How long to wait.

    Attributes:
        timeout: seconds to wait for the next event; None for no limit.
        deadline: seconds for all of them together; None for no limit.
    """

    timeout: float | None
    deadline: float | None
    _end: float = field(init=False, default=math.inf)

    def __post_init__(self) -> None:
        for seconds in (self.timeout, self.deadline):
            if seconds is not None and seconds <= 0:
                raise ValueError(f"a timeout of {seconds} seconds: it must be above zero")
        if self.deadline is not None:
            self._end = time.monotonic() + self.deadline

    def left(self) -> float | None:
        """Return the seconds to wait for the next event; None for no limit."""
        left = min(math.inf if self.timeout is None else self.timeout, self._end - time.monotonic())
        return None if left == math.inf else max(left, 0)

    @property
    def expired(self) -> bool:
        """Whether the time for all events together is over."""
        return time.monotonic() >= self._end


def check_socket(connection: socket.socket) -> None:
    """Raise ValueError unless a socket is a Unix socket of type SOCK_SEQPACKET."""
    if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ValueError(f"{connection!r} is not a Unix socket of type SOCK_SEQPACKET")
