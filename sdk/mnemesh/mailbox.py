"""The bounded mailbox of one operation: so many at work, so many waiting, the rest refused at once.

`offer` never blocks, so a subscription callback may call it. Work runs in tasks of the actor's task group.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Runs `work(item)` for each item offered, at most `concurrency` at a time, first come first served.

    `work` must not raise: an exception from it ends the task group that the mailbox lives in.
    """

    def __init__(
        self,
        work: Callable[[Item], Awaitable[None]],
        *,
        capacity: int,
        concurrency: int,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._work = work
        self._capacity = capacity
        self._concurrency = concurrency
        self._tasks = tasks
        self._waiting: deque[Item] = deque()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return self._running

    def offer(self, item: Item) -> bool:
        """Take an item, or return `False` when the mailbox is full."""
        if self._running < self._concurrency:
            self._running += 1
            self._idle.clear()
            self._tasks.create_task(self._run(item))
            return True
        if len(self._waiting) >= self._capacity:
            return False
        self._waiting.append(item)
        return True

    async def finished(self) -> None:
        """Wait until nothing runs and nothing waits."""
        await self._idle.wait()

    async def _run(self, item: Item) -> None:
        try:
            while True:
                await self._work(item)
                if not self._waiting:
                    return
                item = self._waiting.popleft()
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
