"""Supervision of background work: restart with backoff, escalate when restarting does not help."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

logger = logging.getLogger("mnemesh.supervision")


class Escalated(Exception):
    """Work failed too often to be restarted once more. It ends the process, whose parent starts it afresh."""


class Supervisor:
    """Runs `work` until it returns. When it raises, waits and runs it again, as one-for-one supervisors do.

    More than `most` failures within `window_s` seconds raise `Escalated` from the last one. `on_failure` hears of each
    and may raise it sooner.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        *,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        most: int = 8,
        window_s: float = 60.0,
        first_backoff_s: float = 0.1,
        longest_backoff_s: float = 10.0,
    ) -> None:
        self.name = name
        self.restarts = 0
        self._work = work
        self._on_failure = on_failure
        self._most = most
        self._window_s = window_s
        self._first_backoff_s = first_backoff_s
        self._longest_backoff_s = longest_backoff_s
        self._failures: deque[float] = deque()

    async def run(self) -> None:
        """Run the work to its end. Raises `Escalated`; cancellation passes through."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._work()
                return
            except (Exception, asyncio.CancelledError) as error:  # a supervisor answers every failure of its work
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                    raise
                self._on_failure(error)
                now = loop.time()
                self._failures.append(now)
                while self._failures[0] < now - self._window_s:
                    self._failures.popleft()
                if len(self._failures) > self._most:
                    raise Escalated(f"{self.name} failed {len(self._failures)} times") from error
                self.restarts += 1
                ceiling = min(self._longest_backoff_s, self._first_backoff_s * 2.0 ** (len(self._failures) - 1))
                logger.warning("%s failed and starts again: %r", self.name, error)
                await asyncio.sleep(random.uniform(ceiling / 2, ceiling))


async def first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Do them together until one ends, and end the others. What that one raises is raised.

    No task group: that of Python 3.11 hides a cancellation that comes in the same round as a failure.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
