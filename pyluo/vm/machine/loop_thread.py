"""An event loop in a thread of its own, for coroutines that threads without a loop wait for."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["LoopThread"]

R = TypeVar("R")


class LoopThread:
    """An event loop, running in a thread; any other thread can use it.

    Raises:
        RuntimeError: the thread could not be started.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pyluo-vm", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine in the loop, wait for it, and return its result or raise its exception.

        If the wait is interrupted, the coroutine is cancelled.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def catch_up(self) -> None:
        """Wait until the loop has begun all that it was told to run before."""
        self.run(asyncio.sleep(0))

    def close(self) -> None:
        """Stop the loop, and wait until its thread has ended."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
