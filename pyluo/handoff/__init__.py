"""Handing descriptors, their names and a state from a running process to its successor.

There are two ways: to another process through a Unix socket (`send` and `receive`), or to another
program in the same process (`exec_with` and `inherited`). After a successful handoff, each side
knows that the other one completed it; `send` describes what is known after a failure.
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
