"""The guest's ends of the channels to the host."""

from __future__ import annotations

import os

from pyluo.guest import wire

__all__ = ["HEART", "NAME", "TERMINAL", "Port", "mark", "open_by_name"]

NAME = "pyluo.control"
HEART = "pyluo.heart"
TERMINAL = "pyluo.terminal"
_PORTS = "/sys/class/virtio-ports"


class Port:
    """A virtio-serial port that leads to the host."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = bytearray()

    @classmethod
    def find(cls, name: str = NAME) -> Port:
        """Opens the port by the name that the host gave it.

        Raises:
            FileNotFoundError: this machine has no such port.
            OSError: EBUSY, somebody has it open.
        """
        return cls(open_by_name(name))

    def fileno(self) -> int:
        """The descriptor, to wait for."""
        return self._fd

    def close(self) -> None:
        """Closes it."""
        os.close(self._fd)

    def greet(self, message: wire.Frame) -> None:
        """The first message of a life; the empty line before it ends whatever was cut short."""
        self._write(b"\n" + wire.frame(message))

    def send(self, message: wire.Frame) -> None:
        """Writes one message, whole."""
        self._write(wire.frame(message))

    def receive(self) -> wire.Frame:
        """The next message that parses; waits for it."""
        searched = 0
        while True:
            # From where the last look ended: a read brings 4 KiB of what may be megabytes.
            end = self._pending.find(b"\n", searched)
            if end < 0:
                searched = len(self._pending)
                self._pending += os.read(self._fd, 1 << 20)
                continue
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            searched = 0
            if message := wire.parse(line):
                return message

    def receive_some(self) -> list[wire.Frame]:
        """The messages that one read brings, which may be none; waits for something to read."""
        self._pending += os.read(self._fd, 1 << 20)
        *lines, self._pending = self._pending.split(b"\n")
        return [message for line in lines if (message := wire.parse(bytes(line)))]

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


def open_by_name(name: str, flags: int = 0) -> int:
    """Opens a port by the name that the host gave it, and returns the descriptor.

    Raises:
        FileNotFoundError: this machine has no such port.
    """
    for device in os.listdir(_PORTS):
        with open(f"{_PORTS}/{device}/name") as file:
            if file.read().strip() == name:
                return os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC | flags)
    raise FileNotFoundError(f"no virtio-serial port is called {name}")


_port: Port | None = None


def use(port: Port) -> None:
    """Names the port that `mark` writes to."""
    global _port
    _port = port


def mark(event: str) -> None:
    """Tells the host, from a function that runs in the guest, that something happened just now."""
    if _port is None:
        raise RuntimeError("mark() works only in a function that the host called in a guest")
    _port.send({"mark": event})
