"""Part of the pytest plugin: how many tests used a guest, and what that took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm.machine.usage import Usage, usage

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

__all__: list[str] = []


@dataclass(slots=True)
class _Count:
    """What the tests of this process, and of the workers it started, did.

    Attributes:
        ran: how many tests there were.
        drove: how many of them did something with a guest.
        boots: how many guests the workers started.
        live_updates: how many jumps those made.
    """

    ran: int = 0
    drove: int = 0
    boots: int = 0
    live_updates: int = 0

    def add(self, others: Mapping[str, int]) -> None:
        """Adds what another process counted."""
        for name, value in others.items():
            setattr(self, name, getattr(self, name) + value)


_count_key = pytest.StashKey[_Count]()
_OUTPUT = "pyluo"  # of a worker of pytest-xdist: what it counted


def pytest_configure(config: pytest.Config) -> None:
    """Begins the count."""
    config.stash[_count_key] = _Count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Counts the tests, and those that did something with a guest."""
    before = _used()
    result = yield
    count = item.config.stash[_count_key]
    count.ran += 1
    count.drove += _used() != before
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends home what this worker has counted."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT] = asdict(_whole(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what a worker has counted; one that crashed says nothing."""
    counted = getattr(node, "workeroutput", {}).get(_OUTPUT, {})
    node.config.stash[_count_key].add(counted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many tests used a guest, and how many guests and jumps that took."""
    count = _whole(terminalreporter.config)
    if count.boots:
        terminalreporter.write_line(
            f"vm-tests: {count.ran} ran, {count.drove} of them drove a guest; "
            f"guests booted: {count.boots}, live updates made: {count.live_updates}"
        )


def _whole(config: pytest.Config) -> _Count:
    """The count, with the guests of this process."""
    count = replace(config.stash[_count_key])
    count.add({"boots": usage.boots, "live_updates": usage.live_updates})
    return count


def _used() -> Usage:
    """What this process has done with guests so far."""
    return replace(usage, running=[], ended=None)
