"""Handing over named descriptors, and bytes that describe a state, to a successor.

The successor is either another process, which is connected by a Unix socket (`send` and
`receive`), or the next program in the same process (`exec_with` and `inherited`). When a handoff
through a socket succeeds, each side knows that the other side has completed it. The docstring of
`send` says what each side knows after a failure.
"""

from __future__ import annotations

from pyluo.handoff.machine import Owner
from pyluo.handoff.over_socket import (
    Receiving,
    Sending,
    connect,
    listen,
    receive,
    receive_async,
    send,
    send_async,
)
from pyluo.handoff.received import Handoff
from pyluo.handoff.through_exec import exec_with, inherited
from pyluo.peer import Peer, same_user

__all__ = [
    "Handoff",
    "Owner",
    "Peer",
    "Receiving",
    "Sending",
    "connect",
    "exec_with",
    "inherited",
    "listen",
    "receive",
    "receive_async",
    "same_user",
    "send",
    "send_async",
]
