"""The host's end of the connection to `pyluo.guest.terminal`, which runs a program in a guest."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.guest import wire

if TYPE_CHECKING:
    import socket

__all__ = ["Line"]

_CHUNK = 1 << 16


class Line:
    """Sends and receives messages without ever waiting.

    Args:
        channel: the socket that is the host's end of the guest's port.

    Attributes:
        closed: whether QEMU has closed the port.
    """

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._boot_id = ""
        self._outgoing = b""
        self._incoming = b""
        self.closed: bool = False

    def fileno(self) -> int:
        """Return the descriptor of the port, for poll(2)."""
        return self._channel.fileno()

    @property
    def unsent(self) -> int:
        """The number of bytes that are still to be sent."""
        return len(self._outgoing)

    def begin_life(self, boot_id: str) -> None:
        """From now on, send messages to the new life.

        Discard what is still unsent for the previous life.

        Args:
            boot_id: the boot id of the new life.
        """
        self._boot_id = boot_id
        self._outgoing = b"\n"  # ends a message that a jump may have cut off

    def send(self, **message: object) -> None:
        """Send a message; if the guest cannot take all of it now, `flush` sends the rest."""
        self._outgoing += wire.to_line({"boot_id": self._boot_id, **message})
        self.flush()

    def flush(self) -> None:
        """Send as many bytes as the guest can take now."""
        with suppress(BlockingIOError, ConnectionError):
            sent = self._channel.send(self._outgoing)
            self._outgoing = self._outgoing[sent:]

    def receive(self) -> list[wire.Message]:
        """Read once, and return the messages that are complete now, possibly none.

        Messages of an earlier life may come first.
        """
        try:
            data = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        self.closed = not data
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        return [message for line in lines if (message := wire.parse(line))]

    def drain(self) -> list[wire.Message]:
        """Return all messages that have arrived so far."""
        messages: list[wire.Message] = []
        while not self.closed:
            before = len(self._incoming)
            more = self.receive()
            messages += more
            if not more and len(self._incoming) == before:
                break
        return messages
