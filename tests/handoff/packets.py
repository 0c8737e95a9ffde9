"""Packets of a handoff, sent and received without pyluo, for the tests."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ["", "READY", "OFFER", "WANT", "FILES", "COMPLETE", "COMMIT", "REFUSED", "TAKEN"]
VERSION = 2
MAX_FDS = 253

Sent = tuple[bytes, list[int]]


@dataclass
class Packet:
    data: bytes
    fds: list[int]

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def pack(kind: str, number: int = 0) -> bytes:
    return struct.pack("<8sHHI", b"pyluoHOP", VERSION, KINDS.index(kind), number)


def send_packet(end: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    ucred = struct.pack("3i", os.getpid(), os.geteuid(), os.getegid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ucred)]
    if fds:
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
    end.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive_packet(end: socket.socket) -> Packet:
    data, ancillary, _, _ = end.recvmsg(4096, 4096, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += struct.unpack(f"{len(content) // 4}i", content)
    return Packet(data, fds)


def send_packets(end: socket.socket, packets: Sequence[Sent]) -> None:
    for data, fds in packets:
        send_packet(end, data, fds)


def received_packets(end: socket.socket) -> list[tuple[str, int, int]]:
    """Return the kind, the number and the count of descriptors of each packet in a socket."""
    end.settimeout(0.01)
    found = []
    with suppress(TimeoutError):
        while True:
            with suppress(ConnectionResetError):
                packet = receive_packet(end)
                if not packet.data:
                    break
                _, _, kind, number = struct.unpack_from("<8sHHI", packet.data)
                found.append((KINDS[kind], number, len(packet.fds)))
                packet.close()
    return found
