"""Handing over named descriptors, and bytes that describe a state, to a successor.

The successor is either another process, which is connected by a Unix socket (`send` and
`receive`), or the next program in the same process (`exec_with` and `inherited`). When a handoff
through a socket succeeds, each side knows that the other side has completed it. The docstring of
`send` says what each side knows after a failure.
"""

from __future__ import annotations

from pyluo.handoff.over_socket import connect, listen, receive, send
from pyluo.handoff.received import Handoff
from pyluo.handoff.through_exec import exec_with, inherited
from pyluo.peer import Peer, same_user

__all__ = [
    "Handoff",
    "Peer",
    "connect",
    "exec_with",
    "inherited",
    "listen",
    "receive",
    "same_user",
    "send",
]
