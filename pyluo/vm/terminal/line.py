"""The connection to a terminal in a guest: frames over the host's end of a port."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.guest import wire

if TYPE_CHECKING:
    import socket

__all__ = ["Line"]

_CHUNK = 1 << 16


class Line:
    """Sends and receives frames, and never waits.

    Args:
        channel: the host's end of the port.

    Attributes:
        closed: whether QEMU has closed the port.
    """

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._boot_id = ""
        self._outgoing = b""
        self._incoming = b""
        self.closed = False

    def fileno(self) -> int:
        """Return the descriptor of the port, for poll(2)."""
        return self._channel.fileno()

    @property
    def unsent(self) -> int:
        """The number of bytes that are not sent yet."""
        return len(self._outgoing)

    def begin_life(self, boot_id: str) -> None:
        """Send to another life from now on, and drop what was not sent to the last one.

        Args:
            boot_id: the boot id of that life.
        """
        self._boot_id = boot_id
        self._outgoing = b"\n"  # ends a frame that a jump may have cut off

    def send(self, **message: object) -> None:
        """Send a message; `flush` sends the rest if the guest cannot take all of it now."""
        self._outgoing += wire.to_line({"boot_id": self._boot_id, **message})
        self.flush()

    def flush(self) -> None:
        """Send as many bytes as the guest can take now."""
        with suppress(BlockingIOError, ConnectionError):
            sent = self._channel.send(self._outgoing)
            self._outgoing = self._outgoing[sent:]

    def receive(self) -> list[wire.Message]:
        """Return the messages that have arrived completely; those of earlier lives come first."""
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
        """Return all messages that have arrived by now."""
        messages: list[wire.Message] = []
        while not self.closed:
            before = len(self._incoming)
            more = self.receive()
            messages += more
            if not more and len(self._incoming) == before:
                break
        return messages
