"""The bounded mailbox of one operation: so many at work, so many waiting, the rest refused at once.

Of one sender there is no more than its share, so that who sends too much keeps nobody else out.
`offer` never blocks, so a subscription callback may call it. Work runs in tasks of the actor's task group.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Runs `work(item)` for each item offered, at most `concurrency` at a time, first come first served.

    Of each sender at most `share` items are at work or wait; as many as there is room for if it is not given.
    `work` must not raise: an exception from it ends the task group that the mailbox lives in.
    """

    def __init__(
        self,
        work: Callable[[Item], Awaitable[None]],
        *,
        capacity: int,
        concurrency: int,
        share: int | None = None,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._work = work
        self._capacity = capacity
        self._concurrency = concurrency
        self._share = capacity + concurrency if share is None else share
        self._of: Counter[str] = Counter()
        self._tasks = tasks
        self._waiting: deque[tuple[Item, str]] = deque()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return self._running

    def offer(self, item: Item, sender: str = "") -> bool:
        """Take an item, or return `False` when the mailbox, or its sender's share of it, is full."""
        if self._of[sender] >= self._share:
            return False
        if self._running < self._concurrency:
            self._running += 1
            self._idle.clear()
            self._tasks.create_task(self._run(item, sender))
        elif len(self._waiting) < self._capacity:
            self._waiting.append((item, sender))
        else:
            return False
        self._of[sender] += 1
        return True

    async def finished(self) -> None:
        """Wait until nothing runs and nothing waits."""
        await self._idle.wait()

    async def _run(self, item: Item, sender: str) -> None:
        try:
            while True:
                await self._work(item)
                self._of[sender] -= 1
                if not self._of[sender]:
                    del self._of[sender]
                if not self._waiting:
                    return
                item, sender = self._waiting.popleft()
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
