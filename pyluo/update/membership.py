"""`take_part`: a VMM's part in every update, also after its coordinator was started anew."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn

from pyluo.errors import RequestError
from pyluo.update.messages import Abort, Jump, Prepare
from pyluo.update.participant import SOCKET, Participant

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

__all__ = ["CoordinatorLost", "Event", "take_part"]

_REJOIN = 1.0  # seconds until the coordinator is looked for again


class CoordinatorLost:
    """The coordinator has gone, and was not about to jump: a VM that it had stored runs on."""


Event = Participant | Prepare | Abort | Jump | CoordinatorLost
"""What a VMM is told: whom to answer from now on, or what to do."""


def take_part(
    name: str,
    deliver: Callable[[Event], object],
    *,
    path: str | os.PathLike[str] = SOCKET,
    is_stored: Callable[[], bool],
    paused: float | None = None,
    complain: Callable[[str], object],
) -> NoReturn:
    """Join whenever there is a coordinator, and pass on what it wants; never return.

    For a thread of its own, which may end with the process.

    Args:
        name: the name of the VM; see `Participant.join`.
        deliver: is called with each `Participant` that the VMM has joined, then with what that one
            receives, and with a `CoordinatorLost` if its connection ends without a jump.
        path: where the coordinator listens.
        is_stored: returns whether the VM is paused and stored.
        paused: for how many seconds the VM did not run, as its VMM measured it, if it has just been
            resumed after a jump.
        complain: is called with the reason if the VMM cannot join, once for each reason.
    """
    complaint = ""
    while True:
        may_jump = True  # as far as this process can know
        try:
            with Participant.join(
                name, path=path, stored=is_stored(), paused=paused
            ) as coordinator:
                paused = None  # it has been told
                deliver(coordinator)
                may_jump = False
                while (wanted := coordinator.receive()) is not None:
                    may_jump = isinstance(wanted, Jump)
                    deliver(wanted)
        except RequestError as error:
            if complaint != str(error):
                complaint = str(error)
                complain(complaint)
        if not may_jump:
            deliver(CoordinatorLost())
        time.sleep(_REJOIN)
