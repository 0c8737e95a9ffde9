"""A process that is killed at a chosen step."""

from __future__ import annotations

import os
import select
import signal
import socket
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Reach", "StepNotReachedError", "Victim"]

_TIMEOUT = 30.0  # seconds
_REPORT_LIMIT = 4096
_FDS_LIMIT = 64


class StepNotReachedError(RuntimeError):
    """A process did not reach the step at which it was to be killed; it is dead all the same."""


class Reach(Protocol):
    """The function that a victim calls after each step."""

    def __call__(self, step: str, **fds: int) -> None:
        """Continue, or wait here to be killed.

        Args:
            step: the name of the step.
            fds: descriptors that exist by now, with the names under which they can be shared.
        """


class Victim:
    """A process that goes through steps, and stops at one of them until it is killed.

    It is a fork of the caller. Its open descriptors are closed when it dies, unless they are
    shared:

        def life(reach):
            session = device.create_session("vm0")
            reach("create", session=session.fileno())
            session.preserve(ram, 1)
            reach("preserve", session=session.fileno())

        victim = Victim(life, stop_at="preserve")
        victim.kill()

    Args:
        life: the function to run; its argument is the function to call after each step.
        stop_at: the step at which the process waits.
        share: names of descriptors of which the caller gets duplicates.

    Attributes:
        pid: the process id.
        shared: the duplicates, by name; the caller must close them.

    Raises:
        StepNotReachedError: the process ended before the step, or took more than half a minute.
    """

    def __init__(
        self, life: Callable[[Reach], object], *, stop_at: str, share: Sequence[str] = ()
    ) -> None:
        ours, theirs = socket.socketpair()
        self._alive = True
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            _run_life(life, stop_at, share, theirs)
        theirs.close()
        with ours:
            self.shared = self._wait(ours, stop_at, share)

    def kill(self) -> None:
        """Kill the process by SIGKILL, and wait until it is gone; killing it twice does nothing."""
        if self._alive:
            self._alive = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def __repr__(self) -> str:
        return f"Victim(pid={self.pid}, alive={self._alive})"

    def _wait(self, channel: socket.socket, stop_at: str, share: Sequence[str]) -> dict[str, int]:
        fds: list[int] = []
        if select.select([channel], [], [], _TIMEOUT)[0]:
            report, fds, _, _ = socket.recv_fds(channel, _REPORT_LIMIT, _FDS_LIMIT)
        else:
            report = f"it took more than {_TIMEOUT:g} s".encode()
        if report == b"reached":
            return dict(zip(share, fds, strict=True))
        self.kill()
        reason = report.decode(errors="replace") or "it died without a report"
        raise StepNotReachedError(f"step {stop_at!r} was not reached: {reason}")


def _run_life(
    life: Callable[[Reach], object], stop_at: str, share: Sequence[str], channel: socket.socket
) -> NoReturn:
    """Run the function in the forked process, report to the caller's process, and exit."""
    steps: list[str] = []

    def reach(step: str, **fds: int) -> None:
        steps.append(step)
        if step == stop_at:
            socket.send_fds(channel, [b"reached"], [fds[name] for name in share])
            while True:
                signal.pause()

    try:
        life(reach)
        report = f"the process ended after {', '.join(steps) or 'no step'}"
    except BaseException as error:
        report = f"after {', '.join(steps) or 'no step'}: {error!r}"
    try:
        channel.send(report.encode(errors="replace")[:_REPORT_LIMIT])
    finally:
        os._exit(1)
