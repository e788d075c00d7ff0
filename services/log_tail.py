"""The tail of a site's log: what came last, read once for all who follow that log in one process.

A hub has a feed for each device and an eraser, and all of them are mostly at the log's end. Whoever is further back, or
was made for another incarnation of the log, reads it alone until it has come up to the tail. What is forgotten should
not stay in memory for long, so the tail is short. Looks at `mnemesh` only.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from operator import attrgetter

from mnemesh.connection import Link
from mnemesh.follower import Follower, StreamShrank
from mnemesh.inbox import Inbox
from mnemesh.jetstream import ALL, Stored, next_of, stream_state

logger = logging.getLogger("mnemesh.log_tail")

KEPT_S = 10.0
KEPT_BYTES = 16 * 1024 * 1024
OBJECTS_BYTES = 430
"""What a message takes beside its payload."""
MOST_READ = 500

_sequence = attrgetter("sequence")


class LogTail:
    """The last messages of a stream: of 10 to 20 seconds, but no more than 16 MiB of memory. `run` for ever."""

    def __init__(self, link: Link, inbox: Inbox, log: str) -> None:
        self._link = link
        self._inbox = inbox
        self._log = log
        self._incarnation = ""
        self._begins_after = self._ends = 0
        self.head = 0
        """Where the log ends, as far as the server has told."""
        self._kept: list[Stored] = []
        self._bytes = 0
        self._older_until = 0
        """What was kept up to here was there already when the last `KEPT_S` began."""
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Read the log from its end on, for ever; anew where it was made anew, or restored from an older copy."""
        while True:
            state = await stream_state(self._inbox, self._log)
            self._incarnation = state.incarnation
            self._begins_after = self._ends = self._older_until = self.head = state.last_sequence
            self._kept, self._bytes = [], 0
            follower = Follower(
                self._link, self._inbox, self._log, after=state.last_sequence, incarnation=state.incarnation
            )
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._keep_all(follower))
                    tasks.create_task(self._let_go())
            except* StreamShrank as error:
                logger.warning("%s; its tail begins anew", error.exceptions[0])
            finally:
                self._incarnation = ""
                self._tell_news()

    async def batches(self, after: int, incarnation: str) -> AsyncGenerator[list[Stored], None]:
        """Lists of messages after a sequence, in log order, for ever. Raises `StreamShrank`, as `Follower` does."""
        while True:
            while self._covers(after, incarnation):
                if some := self._after(after):
                    after = some[-1].sequence
                    yield some
                else:
                    await self._news.wait()
            follower = Follower(self._link, self._inbox, self._log, after=after, incarnation=incarnation)
            async with aclosing(follower.batches(MOST_READ)) as alone:
                async for some in alone:
                    after = some[-1].sequence
                    yield some
                    if self._covers(after, incarnation):
                        break

    async def next(self, after: int, incarnation: str) -> list[Stored]:
        """The next messages after a sequence, if there are more. Raises `StreamShrank`, and what `next_of` does."""
        if self._covers(after, incarnation):
            return self._after(after)
        if self._incarnation not in ("", incarnation):
            raise StreamShrank(f"{self._log} is another one than before")
        return await next_of(self._inbox, self._log, ALL, after=after)

    def _covers(self, after: int, incarnation: str) -> bool:
        """Whether all that comes after this sequence of the log is in the tail, or will be."""
        return incarnation == self._incarnation != "" and self._begins_after <= after <= self._ends

    def _after(self, sequence: int) -> list[Stored]:
        start = bisect_right(self._kept, sequence, key=_sequence)
        some = self._kept[start : start + MOST_READ]
        if some:
            some[-1] = some[-1]._replace(following=len(self._kept) - start - len(some))
        return some

    async def _keep_all(self, follower: Follower) -> None:
        async with aclosing(follower.batches(MOST_READ)) as batches:
            async for batch in batches:
                self._keep(batch)

    def _keep(self, batch: Sequence[Stored]) -> None:
        self._kept += batch
        self._ends = batch[-1].sequence
        self.head = self._ends + batch[-1].following
        self._bytes += _size(batch)
        while self._bytes > KEPT_BYTES:
            self._drop(upto=self._kept[len(self._kept) // 2].sequence)
        self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _let_go(self) -> None:
        while True:
            await asyncio.sleep(KEPT_S)
            self._drop(upto=self._older_until)
            self._older_until = self._ends

    def _drop(self, upto: int) -> None:
        end = bisect_right(self._kept, upto, key=_sequence)
        self._bytes -= _size(self._kept[:end])
        del self._kept[:end]
        self._begins_after = max(self._begins_after, upto)


def _size(batch: Sequence[Stored]) -> int:
    return sum(len(stored.message.data) + OBJECTS_BYTES for stored in batch)
