"""The plugin's line in pytest's summary: how many tests used guests, and how many guests booted."""

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
    """Counts for this process and the workers of pytest-xdist that it started.

    Attributes:
        ran: how many tests ran.
        used_guests: how many of these tests used a guest.
        boots: how many guests the workers started.
        live_updates: how many jumps the guests of the workers made.
    """

    ran: int = 0
    used_guests: int = 0
    boots: int = 0
    live_updates: int = 0

    def add(self, others: Mapping[str, int]) -> None:
        """Add the counts of another process."""
        for name, value in others.items():
            setattr(self, name, getattr(self, name) + value)


_count_key = pytest.StashKey[_Count]()
_OUTPUT = "pyluo"  # the key of a worker's counts in the data that it returns


def pytest_configure(config: pytest.Config) -> None:
    """Set all counts to zero."""
    config.stash[_count_key] = _Count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Count a test, and whether it used a guest."""
    before = _usage_now()
    result = yield
    count = item.config.stash[_count_key]
    count.ran += 1
    count.used_guests += _usage_now() != before
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the counts of this worker to the main process."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT] = asdict(_total(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts of a worker; a worker that crashed sends none."""
    counted = getattr(node, "workeroutput", {}).get(_OUTPUT, {})
    node.config.stash[_count_key].add(counted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests used a guest, how many guests booted, and how many jumps they made."""
    count = _total(terminalreporter.config)
    if count.boots:
        terminalreporter.write_line(
            f"vm-tests: {count.ran} ran, {count.used_guests} of them drove a guest; "
            f"guests booted: {count.boots}, live updates made: {count.live_updates}"
        )


def _total(config: pytest.Config) -> _Count:
    """Return the counts, to which the guests of this process are added."""
    count = replace(config.stash[_count_key])
    count.add({"boots": usage.boots, "live_updates": usage.live_updates})
    return count


def _usage_now() -> Usage:
    """Return a copy of what this process has done with guests so far."""
    return replace(usage, running=[], ended=None)
