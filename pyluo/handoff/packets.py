"""The packets of a handoff through a socket: see docs/reference/handoff-protocol.md."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

__all__ = ["HEAD", "MAGIC", "MAX_REASON", "VERSION", "Kind", "Outgoing"]

MAGIC = b"pyluoHOP"
VERSION = 2
HEAD = struct.Struct("<8sHHI")
"""The magic, the version, the kind and the number of a packet."""
MAX_REASON = 1000
"""The longest reason in a REFUSED, in bytes."""


class Kind(enum.IntEnum):
    """The kind of a packet."""

    READY = 1
    OFFER = 2
    WANT = 3
    FILES = 4
    COMPLETE = 5
    COMMIT = 6
    REFUSED = 7
    TAKEN = 8


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A packet to send.

    Attributes:
        kind: the kind of the packet.
        data: the bytes of the packet.
        fds: the descriptors to send with it.
    """

    kind: Kind
    data: bytes
    fds: tuple[int, ...] = ()

    @classmethod
    def make(
        cls, kind: Kind, number: int = 0, *, fds: tuple[int, ...] = (), reason: str = ""
    ) -> Outgoing:
        """Return the packet of a kind, with its number, and descriptors or a reason."""
        text = reason.encode(errors="replace")[:MAX_REASON]
        return cls(kind, HEAD.pack(MAGIC, VERSION, kind, number) + text, fds)
