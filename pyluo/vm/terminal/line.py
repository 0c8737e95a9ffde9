"""The host's end of the line to a terminal in a guest."""

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

    Attributes:
        closed: whether QEMU has hung up.
    """

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._boot_id = ""
        self._outgoing = b""
        self._incoming = b""
        self.closed = False

    def fileno(self) -> int:
        """The descriptor, to wait for."""
        return self._channel.fileno()

    @property
    def waiting(self) -> int:
        """Bytes that the guest has not taken yet."""
        return len(self._outgoing)

    def begin(self, boot_id: str) -> None:
        """From here on it leads to this life; what the last one did not take is dropped."""
        self._boot_id = boot_id
        self._outgoing = b"\n"  # ends what a jump may have cut short

    def send(self, **message: object) -> None:
        """Sends a message, as far as there is room for it now."""
        self._outgoing += wire.frame({"boot_id": self._boot_id, **message})
        self.flush()

    def flush(self) -> None:
        """Sends what there is room for now."""
        with suppress(BlockingIOError, ConnectionError):
            sent = self._channel.send(self._outgoing)
            self._outgoing = self._outgoing[sent:]

    def receive(self) -> list[wire.Frame]:
        """The messages that have come in full; those of a life that is over come first."""
        try:
            data = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        self.closed = not data
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        return [message for line in lines if (message := wire.parse(line))]

    def drain(self) -> list[wire.Frame]:
        """All messages that are there by now."""
        messages: list[wire.Frame] = []
        while not self.closed:
            before = len(self._incoming)
            more = self.receive()
            messages += more
            if not more and len(self._incoming) == before:
                break
        return messages
