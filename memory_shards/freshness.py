"""The four consistency levels of a read: `eventual`, `session`, `bounded`, `strong`.

Each but the first says which log sequence the replica must have applied; the read waits for it within its budget,
else it is `stale`. `bounded` and `strong` need the log's head, as it was at most so long ago.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from memory_shards.watermark import Watermark
from mnemesh.call import Call
from mnemesh.errors import BadRequest, Stale
from mnemesh.messages import Consistency

REPLY_MARGIN_S = 0.02
"""What is kept of the budget to say `stale` in time."""


class LogHead:
    """The log's last sequence, asked of the server. Reads that arrive while one asks share the next answer."""

    def __init__(self, ask: Callable[[], Awaitable[int]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._sequence = 0
        self._asked_at = float("-inf")

    async def as_of(self, moment: float) -> int:
        """The head as it was at loop time `moment` or later."""
        while self._asked_at < moment:
            async with self._lock:
                if self._asked_at < moment:
                    asked_at = asyncio.get_running_loop().time()
                    self._sequence = await self._ask()
                    self._asked_at = asked_at
        return self._sequence


class Freshness:
    """Makes reads of one site's projections wait until they are as fresh as their caller demands."""

    def __init__(self, site: str, head: LogHead) -> None:
        self._site = site
        self._head = head

    async def wait(self, consistency: Consistency | None, watermark: Watermark, call: Call) -> None:
        """Return once `watermark` satisfies `consistency`. Raises `Stale` when the budget is about to run out."""
        if consistency is None or consistency.level == "eventual":
            return
        try:
            async with asyncio.timeout_at(call.deadline - REPLY_MARGIN_S):
                sequence = await self._demanded(consistency)
                await watermark.reached(sequence)
        except TimeoutError as error:
            raise Stale(
                f"this replica stands at {watermark.value} of {self._site}, behind what "
                f"{consistency.level!r} demands, and did not catch up within the budget",
                retry_after_ms=50,
            ) from error

    async def _demanded(self, consistency: Consistency) -> int:
        now = asyncio.get_running_loop().time()
        if consistency.level == "session":
            return consistency.token.get(self._site, 0)
        if consistency.level == "strong":
            return await self._head.as_of(now)
        if consistency.max_lag_ms is None:
            raise BadRequest("consistency 'bounded' needs max_lag_ms")
        return await self._head.as_of(now - consistency.max_lag_ms / 1000)
