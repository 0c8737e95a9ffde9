"""Tests of how a guest ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pyluo.vm.machine.guest import Guest


class Monitor:
    """What stands for the connection to QEMU's monitor; its end is what a test wants it to be."""

    def __init__(self, end: BaseException | None) -> None:
        self.end = end

    async def disconnect(self) -> None:
        if self.end is None:
            await asyncio.sleep(60)
        else:
            raise self.end


def guest(end: BaseException | None) -> Any:
    made: Any = Guest.__new__(Guest)
    made._qmp = Monitor(end)
    return made


@pytest.mark.parametrize("end", [asyncio.CancelledError(), EOFError(), RuntimeError("no")])
def test_how_the_monitor_ends_matters_to_nobody(end: BaseException) -> None:
    asyncio.run(guest(end)._disconnect())


def test_a_monitor_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyluo.vm.machine.guest._DISCONNECT_LIMIT", 0.1)
    asyncio.run(guest(None)._disconnect())


def test_who_cancels_the_end_of_a_guest_is_heard() -> None:
    async def cancelled() -> bool:
        task = asyncio.create_task(guest(None)._disconnect())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelled()

    assert asyncio.run(cancelled())
