"""A peer of a VM: it sends numbered bytes over one TCP connection, and gets each of them back."""

from __future__ import annotations

import socket
import threading
import time
from typing import Self

_PART = 256  # bytes to send at once
_WINDOW = 2048  # bytes that are under way at most, so that some are, at each jump
_PAUSE = 0.02  # seconds between two parts: the VM has other things to do
_PATIENCE = 240.0  # seconds for a byte to come back


def byte(offset: int) -> int:
    """Return the byte at an offset of the stream, as the program in the VM knows it."""
    return (offset ^ offset >> 8 ^ offset >> 16) & 0xFF


class Stream:
    """A connection to a port of this machine that is forwarded to a VM, and threads that use it.

    Attributes:
        sent: how many bytes were sent.
        returned: how many of them have come back, each as it was.
    """

    def __init__(self, port: int) -> None:
        self.sent = self.returned = 0
        self._failure: Exception | None = None
        self._ending = threading.Event()  # nothing is sent any more
        self._closing = False
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.settimeout(_PATIENCE)
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._closing = True
        self._connection.shutdown(socket.SHUT_RDWR)  # which ends the threads
        for thread in self._threads:
            thread.join()
        self._connection.close()

    def wait_for_more(self) -> int:
        """Wait until bytes have come back that were not yet sent; return how many have in all."""
        wanted = self.sent + 1
        deadline = time.monotonic() + _PATIENCE
        while self.returned < wanted:
            self.check()
            assert time.monotonic() < deadline, f"{self.returned} of {self.sent} bytes came back"
            time.sleep(0.05)
        return self.returned

    def finish(self) -> None:
        """Stop sending, and wait until every byte has come back.

        The VM sends back what it gets: its own count tells that it got none twice.
        """
        self._ending.set()
        self._threads[0].join()
        deadline = time.monotonic() + _PATIENCE
        while self.returned < self.sent:
            self.check()
            assert time.monotonic() < deadline, f"{self.returned} of {self.sent} bytes came back"
            time.sleep(0.05)
        self.check()
        assert self.returned == self.sent

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send(self) -> None:
        try:
            while not self._ending.is_set():
                if self.sent - self.returned < _WINDOW:
                    part = bytes(byte(self.sent + at) for at in range(_PART))
                    self._connection.sendall(part)
                    self.sent += _PART
                self._ending.wait(_PAUSE)
        except OSError as error:
            self._failure = error

    def _receive(self) -> None:
        try:
            while part := self._connection.recv(4096):
                for value in part:
                    if value != byte(self.returned):
                        raise AssertionError(f"byte {self.returned} came back as {value}")
                    self.returned += 1
            if not self._closing:
                raise AssertionError("the VM has ended the connection")
        except (OSError, AssertionError) as error:
            if not self._closing:
                self._failure = error
