"""A watermark that reads can wait for: the last log sequence that a projection has applied."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count


class Watermark:
    """Only grows, until it begins anew. Belongs to one event loop."""

    def __init__(self, value: int = 0) -> None:
        self._value = value
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()
        self._heir: Watermark | None = None
        self.awaited = asyncio.Event()
        """Set when somebody begins to wait."""

    @property
    def value(self) -> int:
        return self._value if self._heir is None else self._heir.value

    @property
    def own(self) -> int:
        """The value of this one, also where another counts."""
        return self._value

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for it to grow."""
        return any(not waiter.done() for _, _, waiter in self._waiters)

    def advance(self, value: int) -> None:
        """Move up to `value` and wake whoever waited for it."""
        self._value = max(self._value, value)
        while self._waiters and self._waiters[0][0] <= self._value:
            _, _, waiter = heapq.heappop(self._waiters)
            if not waiter.done():
                waiter.set_result(None)

    def succeeded_by(self, heir: Watermark) -> None:
        """From now on it is another that counts: whoever waits, or will, waits for that one."""
        self._heir = heir
        for sequence, _, waiter in self._waiters:
            heapq.heappush(heir._waiters, (sequence, next(heir._order), waiter))
        if self._waiters:
            heir.awaited.set()
        self._waiters = []
        heir.advance(heir.value)

    def begin_anew(self) -> None:
        """Stand at 0 again: what it counts did. Whoever waits waits on."""
        self._value = 0

    async def reached(self, sequence: int) -> None:
        """Return once the watermark is at least `sequence`. Bound it with `asyncio.timeout`."""
        if self._heir is not None:
            await self._heir.reached(sequence)
            return
        if sequence <= self._value:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (sequence, next(self._order), waiter))
        self.awaited.set()
        await waiter
