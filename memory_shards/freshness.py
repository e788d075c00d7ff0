"""The four consistency levels of a read: `eventual`, `session`, `bounded`, `strong`.

Each but the first says which log sequence the replica must have applied; the read waits for it within its budget,
else it is `stale`. `bounded` and `strong` need the log's head, as it was at most so long ago. A session's token may
name other sites: then their events must have come here, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from memory_shards.origins import Origins
from memory_shards.watermark import Watermark
from mnemesh.call import Call
from mnemesh.errors import BadRequest, Stale
from mnemesh.messages import Consistency, Token

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

    def __init__(self, site: str, head: LogHead, origins: Origins) -> None:
        self._site = site
        self._head = head
        self._origins = origins

    async def wait(self, consistency: Consistency | None, watermark: Watermark, call: Call) -> Token:
        """Return once `watermark` satisfies `consistency`: what a read then sees. Raises `Stale` in time."""
        if consistency is None or consistency.level == "eventual":
            return {self._site: watermark.value}
        try:
            async with asyncio.timeout_at(call.deadline - REPLY_MARGIN_S):
                sequence = await self._demanded(consistency)
                await watermark.reached(sequence)
        except TimeoutError as error:
            seen = self.seen(watermark.value, consistency)
            stands = ", ".join(f"{sequence} of {site}" for site, sequence in seen.items())
            raise Stale(
                f"this replica stands at {stands}, behind what {consistency.level!r} demands, and did not catch up "
                "within the budget",
                retry_after_ms=50,
            ) from error
        return self.seen(watermark.value, consistency)

    def seen(self, sequence: int, consistency: Consistency | None) -> Token:
        """Where a read stands that saw this log up to a sequence: in it, and in those that its demand names."""
        origins = () if consistency is None else consistency.token
        return {self._site: sequence} | self._origins.at(sequence, origins)

    async def _demanded(self, consistency: Consistency) -> int:
        now = asyncio.get_running_loop().time()
        if consistency.level == "session":
            token = consistency.token
            carried = [await self._origins.local(site, token[site]) for site in token if site != self._site]
            return max([token.get(self._site, 0), *carried])
        if consistency.level == "strong":
            return await self._head.as_of(now)
        if consistency.max_lag_ms is None:
            raise BadRequest("consistency 'bounded' needs max_lag_ms")
        return await self._head.as_of(now - consistency.max_lag_ms / 1000)
