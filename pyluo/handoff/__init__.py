"""From a running process to its successor: descriptors, their names, and a state.

Two ways: to another process over a Unix socket (`send` and `receive`), or to another program in
the same process (`exec_with` and `inherited`). Either side of a successful handoff knows that the
other one is done with it; see `send` for what to believe of a failed one.
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
