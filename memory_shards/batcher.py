"""Natural batching: whatever waits when the worker is free goes to it in one call. Nothing waits for one to fill."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Query = TypeVar("Query")
Answer = TypeVar("Answer")


class Batcher(Generic[Query, Answer]):
    """Collects queries while `work` is busy. `work` takes a list and returns an answer or an exception for each."""

    def __init__(
        self, work: Callable[[Sequence[Query]], Awaitable[Sequence[Answer | Exception]]], *, most: int = 64
    ) -> None:
        self._work = work
        self._most = most
        self._waiting: deque[tuple[Query, asyncio.Future[Answer]]] = deque()
        self._wake = asyncio.Event()
        self.batches = 0
        self.queries = 0

    async def ask(self, query: Query) -> Answer:
        """The answer to one query. Raises what `work` returned or raised for it."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, answer))
        self._wake.set()
        return await answer

    async def run(self) -> None:
        """Work through the queue for ever. A failure of `work` goes to those whose batch it was."""
        while True:
            await self._wake.wait()
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            if not self._waiting:
                self._wake.clear()
            # A caller whose budget ran out while it waited has cancelled its future.
            batch = [(query, answer) for query, answer in batch if not answer.done()]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[tuple[Query, asyncio.Future[Answer]]]) -> None:
        self.batches += 1
        self.queries += len(batch)
        try:
            answers = await self._work([query for query, _ in batch])
        except asyncio.CancelledError:
            self._waiting.extendleft(reversed(batch))  # for the next run
            self._wake.set()
            raise
        except Exception as error:  # noqa: BLE001 - handed to every caller of this batch, who answer it
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
