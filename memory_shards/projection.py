"""A projection: one store kept up to date from the log, with a watermark and a worker thread of its own.

Projections of one shard share the follower and nothing else, so a slow store never delays another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from memory_shards.stores import Store
from memory_shards.transactions import transactions
from memory_shards.watermark import Watermark
from mnemesh.event import Record

Result = TypeVar("Result")

MOST_PUT_OFF = 10_000
"""Sequences of the log that a store may be behind in its file where no read can tell, and so replays after a crash."""

SETTLE_EVERY_S = 0.5
"""How often a store takes a step where nothing waits: that is some 20 ms, and where things are forgotten now and then,
there always is one to take."""

MOST_WAITING = 8
"""Batches that may wait for a store before the follower stops reading for all of them."""


class Projection:
    """Feeds one store. `offer` records in log order; `run` applies them; `on_worker` runs reads beside them.

    `most` bounds how many records one transaction applies, and so how long it keeps the worker from reads; an atomic
    write of more is one all the same. Records that
    no read can tell of are put off until a transaction that there is anyway: their watermark is reached at once.
    While nothing waits, the store settles, step by step.
    """

    def __init__(self, name: str, store: Store, *, most: int = 1000) -> None:
        self.name = name
        self.store = store
        self.watermark = Watermark(store.watermark)
        self.applied = 0
        self.offered = store.watermark
        """Up to where the log was handed over; what is not applied yet waits, also while the follower starts again."""
        self._most = most
        self._put_off: list[Record] = []
        self._may_settle = True
        self._current: tuple[Sequence[Record], int] | None = None
        self._queue: asyncio.Queue[tuple[Sequence[Record], int]] = asyncio.Queue(MOST_WAITING)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"store-{name}")

    async def offer(self, records: Sequence[Record], watermark: int) -> None:
        """Hand over the records up to `watermark`; waits while the store is far behind. What it has had is left out."""
        if watermark <= self.offered:
            return
        if records and records[0].sequence <= self.offered:
            records = [record for record in records if record.sequence > self.offered]
        await self._queue.put((records, watermark))
        self.offered = watermark

    async def run(self) -> None:
        """Apply what is offered, for ever. If the store fails, the next run begins with what it did not commit.

        A store that failed to settle tries again after its next transaction: until then its disk may be full.
        """
        while True:
            if self._current is None:
                is_due = self._may_settle and not self.store.is_settled
                try:
                    async with asyncio.timeout(SETTLE_EVERY_S if is_due else None):
                        records, watermark = await self._next()
                except TimeoutError:
                    await self._settle()
                    continue
                if self._can_wait(records, watermark):
                    self._put_off += records
                    self.watermark.advance(watermark)
                    continue
                self._current = [*self._put_off, *records], watermark
                self._put_off = []
            records, watermark = self._current
            for chunk, reached in transactions(records, watermark, self._most):
                await self.on_worker(self.store.apply, chunk, reached)
                self.applied += len(chunk)
                self.watermark.advance(reached)
            self._current = None
            self._may_settle = True

    async def _settle(self) -> None:
        try:
            await self.on_worker(self.store.settle)
        except Exception:
            self._may_settle = False
            raise

    def _can_wait(self, records: Sequence[Record], watermark: int) -> bool:
        return (
            len(self._put_off) + len(records) < self._most
            and watermark - self.store.watermark < MOST_PUT_OFF
            and not any(map(self.store.shows, records))
        )

    @property
    def stands_at(self) -> int:
        """Up to where reads see the log; may be asked on any thread."""
        return max(self.watermark.own, self.store.watermark)

    async def _next(self) -> tuple[Sequence[Record], int]:
        """What waits, as one batch, so that a store that fell behind catches up in larger transactions."""
        records, watermark = await self._queue.get()
        while len(records) < self._most and not self._queue.empty():
            more, watermark = self._queue.get_nowait()
            records = [*records, *more]
        return records, watermark

    async def on_worker(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run a blocking call on the store's thread, in turn with `apply`."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    async def close(self) -> None:
        """Close the store after what its thread is doing now."""
        await self.on_worker(self.store.close)
        self._worker.shutdown(wait=True)
