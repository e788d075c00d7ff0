"""The four consistency levels of a read: `eventual`, `session`, `bounded`, `strong`.

Each but the first says which log sequence the replica must have applied; the read waits for it within its budget,
else it is `stale`. `bounded` and `strong` need the log's head, as it was at most so long ago. A token may name other
sites: then their events must have come here, too. It is demanded beside the head as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from memory_shards.demand import STRONG
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
            raise self._stale(watermark.value, consistency) from error
        return self.seen(watermark.value, consistency)

    async def has_all(self, stands: int, last_of_it: Callable[[], Awaitable[int]], call: Call) -> bool:
        """Whether all that the log has now of one thing is up to where a read of it stood. Does not wait for it.

        `last_of_it` asks where the last of it is, which is needed only where the replica is behind. Raises `Stale`
        where the log does not say in time.
        """
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(call.deadline - REPLY_MARGIN_S):
                return await self._head.as_of(now) <= stands or await last_of_it() <= stands
        except TimeoutError as error:
            raise self._stale(stands, STRONG) from error

    def _stale(self, sequence: int, demand: Consistency) -> Stale:
        stands = ", ".join(f"{seen} of {site}" for site, seen in self.seen(sequence, demand).items())
        return Stale(
            f"this replica stands at {stands}, behind what {demand.level!r} demands, and did not catch up "
            "within the budget",
            retry_after_ms=50,
        )

    def seen(self, sequence: int, consistency: Consistency | None) -> Token:
        """Where a read stands that saw this log up to a sequence: in it, and in those that its demand names."""
        origins = () if consistency is None else consistency.token
        return {self._site: sequence} | self._origins.at(sequence, origins)

    async def _demanded(self, consistency: Consistency) -> int:
        now = asyncio.get_running_loop().time()
        if consistency.level == "bounded" and consistency.max_lag_ms is None:
            raise BadRequest("consistency 'bounded' needs max_lag_ms")
        token = consistency.token
        carried = [await self._origins.local(site, token[site]) for site in token if site != self._site]
        sequence = max([token.get(self._site, 0), *carried])
        if consistency.level == "session":
            return sequence
        as_of = now - (consistency.max_lag_ms or 0) / 1000 if consistency.level == "bounded" else now
        return max(sequence, await self._head.as_of(as_of))
