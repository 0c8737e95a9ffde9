"""An update of the host's kernel that several VMMs take part in.

The coordinator tells all of them to pause and store their VMs. When all are ready, the host jumps;
if one is not, or the kernel refuses, all run on. The messages are in
docs/reference/update-protocol.md.
"""

from __future__ import annotations

from pyluo.update.membership import CoordinatorLost, Event, take_part
from pyluo.update.messages import Abort, Jump, Prepare
from pyluo.update.participant import SOCKET, Participant

__all__ = [
    "SOCKET",
    "Abort",
    "CoordinatorLost",
    "Event",
    "Jump",
    "Participant",
    "Prepare",
    "take_part",
]
