"""The projection of a store that is a server of its own, which replicas and shards share.

    while this replica has the lease    where does the store stand → follow the log from there → apply
    while another has it                ask where the store stands
    while the store is not there        try again, ever less often

Unlike `Projection` it follows the log by itself, so nothing that is slow or away delays another store. A store that
comes back with less than it had (a snapshot, a failover) is found by its own watermark, and is given the rest again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias, TypeVar

from memory_shards.breaker import Breaker, reason_of
from memory_shards.freshness import REPLY_MARGIN_S
from memory_shards.stores import WentBack
from memory_shards.transactions import transactions
from memory_shards.watermark import Watermark
from mnemesh.errors import MnemeshError, Unavailable
from mnemesh.event import Record
from mnemesh.lease import Held, Lease
from mnemesh.supervision import first_of

logger = logging.getLogger("mnemesh.outside")

Result = TypeVar("Result")

LOOK_EVERY_S = 0.5
"""How often a store is asked where it stands, to find one that went back, or what another replica applied."""
LOOK_WHILE_AWAITED_S = 0.01
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0


class OutsideStore(Protocol):
    """What such a store does on its worker thread. All of it raises one of `outages` where the server is not there."""

    outages: tuple[type[Exception], ...]
    is_shared: bool
    """Whether the shard's other replicas have the same."""

    @property
    def watermark(self) -> int:
        """Where the store stood when it was last asked, or applied."""

    def open(self) -> None:
        """Connect. Raises `BadRequest` on a server that is no good."""

    def look(self) -> int | None:
        """Where the server stands now, which is the `watermark` from then on.

        `None` where what it has is of another log, until `begin`.
        """

    def begin(self, *, afresh: bool) -> None:
        """Have empty what was written for another log (all, if `afresh`), and stand at 0 then. Only who applies may."""

    def apply(self, records: Sequence[Record], watermark: int, after: int) -> None:
        """Commit the effects of `records` and then stand at `watermark`; what was applied already has no effect.

        They are all that came after `after`. Raises `WentBack` where the server stands before that.
        """

    def drop(self) -> None:
        """Delete all that the server has of it."""

    def close(self) -> None:
        """Let go of the connections."""


Follow: TypeAlias = Callable[[int], AsyncGenerator[tuple[list[Record], int], None]]
"""The log's records of the shard's partitions after a sequence, in batches, each with its last sequence."""

Head: TypeAlias = Callable[[], Awaitable[int]]
"""The last sequence of the log."""


class OutsideProjection:
    """Keeps one outside store up to date while this replica has the lease. Reads of it go through its `breaker`."""

    def __init__(self, name: str, store: OutsideStore, *, most: int) -> None:
        self.name = name
        self.store = store
        self.breaker = Breaker(f"the store of {name}", store.outages)
        self.watermark = Watermark()
        self.applied = 0
        self._most = most
        self._is_open = False
        self._is_ours = asyncio.Event()
        self._mendable: tuple[type[Exception], ...] = (*store.outages, WentBack)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"store-{name}")

    async def open(self) -> None:
        """Open the store; one that is not there is opened later. Raises `BadRequest` where it is no good."""
        try:
            await self.on_worker(self.store.open)
            self._is_open = True
            await self._look()
        except self.store.outages as error:
            logger.warning("the store of %s is not there yet: %s", self.name, reason_of(error))

    async def run(self, follow: Follow, head: Head, lease: Lease | Held) -> None:
        """Apply what comes while the lease is held, for ever."""
        backoff = FIRST_BACKOFF_S
        while True:
            began = asyncio.get_running_loop().time()
            try:
                if not self._is_open:
                    await self.on_worker(self.store.open)
                    self._is_open = True
                if lease.is_held:
                    await self.begin(head)
                    await first_of(lease.lost.wait(), self._apply_all(follow), self._look_on())
                else:
                    await first_of(lease.taken.wait(), self._look_on())
            except self._mendable as error:
                if not isinstance(error, WentBack):
                    self.breaker.failed(error)
                if asyncio.get_running_loop().time() - began > LONGEST_BACKOFF_S:
                    backoff = FIRST_BACKOFF_S
                logger.warning("the store of %s: %s; trying again", self.name, reason_of(error))
                await asyncio.sleep(backoff)
                backoff = min(LONGEST_BACKOFF_S, backoff * 2)
            else:
                backoff = FIRST_BACKOFF_S

    async def begin(self, head: Head) -> None:
        """Make the store ready to apply to: empty, where it is of another log, or has more than the log."""
        await self._look()
        ends_before = self.watermark.value > await head()
        if not self._is_ours.is_set() or ends_before:
            await self.on_worker(lambda: self.store.begin(afresh=ends_before))
            await self._look()

    async def _apply_all(self, follow: Follow) -> None:
        after = self.watermark.value
        async with contextlib.aclosing(follow(after)) as batches:
            async for records, last in batches:
                await self._apply(records, last, after)
                after = last

    async def _apply(self, records: Sequence[Record], last: int, after: int) -> None:
        for chunk, reached in transactions(records, last, self._most):
            await self.on_worker(self.store.apply, chunk, reached, after)
            after = reached
            self.breaker.answered()
            self.applied += len(chunk)
            self.watermark.advance(reached)

    async def _look_on(self) -> None:
        """Learn where the store stands, again and again. Raises `WentBack`."""
        while True:
            before = self.watermark.value
            await self._look()
            if self.watermark.value < before:
                raise WentBack(f"it stood at {before} of the log and stands at {self.watermark.value}")
            if self.watermark.is_awaited:
                await asyncio.sleep(LOOK_WHILE_AWAITED_S)
                continue
            self.watermark.awaited.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self.watermark.awaited.wait()

    async def _look(self) -> None:
        stands = await self.on_worker(self.store.look)
        if self.breaker.is_open:  # else it would hide that reads fail, one after the other
            self.breaker.answered()
        if stands is None:
            self._is_ours.clear()
        else:
            self._is_ours.set()
        if (stands or 0) < self.watermark.value:
            self.watermark.begin_anew()
        self.watermark.advance(stands or 0)

    @property
    def stands_at(self) -> int:
        """Up to where reads see the log, as far as is known; they may see more."""
        return max(self.watermark.own, self.store.watermark)

    async def on_worker(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run a blocking call on the store's thread, in turn with `apply`."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    async def ready(self, deadline: float) -> None:
        """Return once the store is one of this log's. Raises `Unavailable` at once where it does not answer."""
        if not self.breaker.refuses and not self._is_ours.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline - REPLY_MARGIN_S):
                    await self._is_ours.wait()
        if self.breaker.refuses or not self._is_ours.is_set():
            state = "does not answer" if self.breaker.refuses else "has yet to be filled"
            raise Unavailable(f"{self.breaker.name} {state}", retry_after_ms=round(FIRST_BACKOFF_S * 1000))

    async def read(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """A read through the breaker. Raises `Unavailable` where the store is not there."""
        if not self._is_ours.is_set():
            raise Unavailable(f"{self.breaker.name} has yet to be filled")
        return await self.breaker.call(work)

    async def close(self) -> None:
        """Close the store after what its thread is doing now."""
        with contextlib.suppress(MnemeshError, *self.store.outages):
            await self.on_worker(self.store.close)
        self._worker.shutdown(wait=True)
