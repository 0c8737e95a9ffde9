"""The virtio-serial ports that connect a guest to the host, as programs in the guest use them."""

from __future__ import annotations

import os

from pyluo.guest import wire

__all__ = [
    "CONTROL", "HEARTBEAT", "PAUSED", "RESUMED", "TERMINAL", "Port", "mark", "mark_vm",
    "open_by_name",
]  # fmt: skip

CONTROL = "pyluo.control"
HEARTBEAT = "pyluo.heartbeat"
TERMINAL = "pyluo.terminal"
PAUSED, RESUMED = "paused", "resumed"  # the events of a VM between which it stands still
_PORTS = "/sys/class/virtio-ports"


class Port:
    """A virtio-serial port to the host that carries messages (see `wire`).

    Args:
        fd: the descriptor of the port's device; `close` closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = bytearray()

    @classmethod
    def find(cls, name: str = CONTROL) -> Port:
        """Open a port by the name that the host gave it.

        Raises:
            FileNotFoundError: this machine has no such port.
            OSError: a process has the port open (EBUSY).
        """
        return cls(open_by_name(name))

    def fileno(self) -> int:
        """Return the descriptor of the port, for poll(2)."""
        return self._fd

    def close(self) -> None:
        """Close the port."""
        os.close(self._fd)

    def send_first(self, message: wire.Message) -> None:
        """Send the first message of a process, after an empty line.

        The line break ends a message that a jump or the end of a process may have cut off.
        """
        self._write(b"\n" + wire.to_line(message))

    def send(self, message: wire.Message) -> None:
        """Send one message."""
        self._write(wire.to_line(message))

    def receive(self) -> wire.Message:
        """Wait for the next complete message, and return it; skip lines that a jump cut off."""
        searched = 0
        while True:
            # Search only the new data, because a message may have megabytes, and each read returns
            # only 4 KiB of it.
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

    def receive_some(self) -> list[wire.Message]:
        """Read once, waiting for data; return the messages that are complete now, possibly none."""
        self._pending += os.read(self._fd, 1 << 20)
        *lines, self._pending = self._pending.split(b"\n")
        return [message for line in lines if (message := wire.parse(bytes(line)))]

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


def open_by_name(name: str, flags: int = 0) -> int:
    """Open a port by the name that the host gave it, and return the descriptor.

    Raises:
        FileNotFoundError: this machine has no such port.
    """
    for device in os.listdir(_PORTS):
        with open(f"{_PORTS}/{device}/name") as file:
            if file.read().strip() == name:
                return os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC | flags)
    raise FileNotFoundError(f"no virtio-serial port is called {name}")


_port: Port | None = None


def set_mark_port(port: Port) -> None:
    """Set the port on which `mark` sends its events."""
    global _port
    _port = port


def mark(event: str) -> None:
    """Add an event to the host's timeline of the live update.

    Args:
        event: the name of the event.

    Raises:
        RuntimeError: this is not the worker's process, which runs the functions that the host
            calls.
    """
    _send_mark({"mark": event})


def mark_vm(vm: str, event: str, *, clock: int | None = None, counter: int | None = None) -> None:
    """Add an event of a VM, whose host this guest is, to the host's timeline.

    A gap begins with the event `PAUSED`; what follows belongs to it, after the jump as well, until
    the VM is paused again. The VM stands still until the event `RESUMED`. Its clock and its counter
    must not go back in a gap: the next check of the guest raises a `VmRegression` if they do.

    Args:
        vm: the name of the VM.
        event: the name of the event: a word for the state of the VM, such as "stored".
        clock: the VM's own clock in nanoseconds, if it is known.
        counter: the number that the VM has counted to, if it is known.

    Raises:
        RuntimeError: see `mark`.
    """
    _send_mark({"mark": event, "vm": vm, "clock": clock, "counter": counter})


def _send_mark(message: wire.Message) -> None:
    if _port is None:
        raise RuntimeError("marks work only in a function that the host called in a guest")
    _port.send(message)
