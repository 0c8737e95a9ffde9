"""A process that is killed after a chosen step of its work."""

from __future__ import annotations

import os
import select
import signal
import socket
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ReachStep", "StepNotReachedError", "Victim"]

_TIMEOUT = 30.0  # seconds
_REPORT_LIMIT = 4096
_FDS_LIMIT = 64


class StepNotReachedError(RuntimeError):
    """A process did not reach the step after which it was to be killed; the process has ended."""


class ReachStep(Protocol):
    """The type of the function that a victim calls after each step."""

    def __call__(self, step: str, **fds: int) -> None:
        """Return at once, or, at the step to stop at, wait to be killed.

        Args:
            step: the name of the step that is done.
            fds: descriptors that are open now, by the names under which they can be shared.
        """


class Victim:
    """A process that runs a function, stops after a chosen step of the function, and is killed.

    The process is a fork of the caller. When the process is killed, the kernel closes its
    descriptors; files of which the caller has a duplicate stay open:

        def steps(reach):
            session = device.create_session("vm0")
            reach("create", session=session.fileno())
            session.preserve(ram, 1)
            reach("preserve", session=session.fileno())

        victim = Victim(steps, stop_at="preserve")
        victim.kill()

    Args:
        steps: the function to run; its argument is the function to call after each step.
        stop_at: the name of the step after which the process waits.
        share: the names of the descriptors of which the caller gets duplicates.

    Attributes:
        pid: the id of the process.
        shared: the duplicates of the descriptors, by name; the caller must close them.

    Raises:
        StepNotReachedError: the process ended before it reached the step, or took more than half a
            minute.
    """

    def __init__(
        self, steps: Callable[[ReachStep], object], *, stop_at: str, share: Sequence[str] = ()
    ) -> None:
        parent_end, child_end = socket.socketpair()
        self._alive = True
        self.pid: int = os.fork()
        if not self.pid:
            parent_end.close()
            _run_steps(steps, stop_at, share, child_end)
        child_end.close()
        with parent_end:
            self.shared: dict[str, int] = self._wait(parent_end, stop_at, share)

    def kill(self) -> None:
        """Kill the process by SIGKILL, and wait until it ended; killing it twice does nothing."""
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


def _run_steps(
    steps: Callable[[ReachStep], object], stop_at: str, share: Sequence[str], channel: socket.socket
) -> NoReturn:
    """Run the function in the forked process, report to the caller's process, and exit."""
    reached: list[str] = []

    def reach(step: str, **fds: int) -> None:
        reached.append(step)
        if step == stop_at:
            socket.send_fds(channel, [b"reached"], [fds[name] for name in share])
            while True:
                signal.pause()

    try:
        steps(reach)
        report = f"the process ended after {', '.join(reached) or 'no step'}"
    except BaseException as error:
        report = f"after {', '.join(reached) or 'no step'}: {error!r}"
    try:
        channel.send(report.encode(errors="replace")[:_REPORT_LIMIT])
    finally:
        os._exit(1)
