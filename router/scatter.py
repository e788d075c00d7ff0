"""Asking many shards at once, and what their answers cover.

Each shard is addressed by name, so one without a replica answers at once (no responders) instead of eating the budget.
Where a shard has several replicas, one that is slower than the observed p95 is hedged: the request goes out once
more, at most for one in ten requests (Dean and Barroso, "The Tail at Scale", 2013).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.contract import AnyOperation
from mnemesh.errors import BadRequest, Denied, MnemeshError, NotFound, TooLarge, Unavailable
from mnemesh.ids import PARTITIONS
from mnemesh.messages import Coverage, Missing, SiteCoverage, Token
from router.shard_map import ShardEntry

ABOUT_THE_REQUEST = (BadRequest, Denied, TooLarge)
"""What one shard says of a request holds for all of it; as a gap in the coverage it would hide the caller's mistake."""

REPLY_MARGIN_S = 0.01
"""What is kept of the budget to merge and answer."""
HEDGED_AT_MOST = 0.1
_OBSERVED = 512
_RECOMPUTED_EVERY = 64


class Gathered(NamedTuple):
    """The replies by shard, and the errors of the shards that did not answer."""

    replies: dict[str, Any]
    errors: dict[str, MnemeshError]


class Scatter:
    """Sends one operation to several shards under the budget of the current call."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._latencies: dict[str, Latencies] = {}

    async def ask(
        self,
        operation: AnyOperation,
        requests: Mapping[str, tuple[str, object]],
        shards: Mapping[str, ShardEntry],
        call: Call,
    ) -> Gathered:
        """Ask each shard its (subject, request). The error of a shard is part of the answer.

        Raises what a shard says that is about the request itself.
        """
        budget_s = call.remaining_s() - REPLY_MARGIN_S
        if all(shards[name].replicas < 2 for name in requests):
            outcomes = await self._asker.scatter(operation, list(requests.values()), budget_s=budget_s)
        else:
            latencies = self._latencies.setdefault(operation.name, Latencies())
            outcomes = await asyncio.gather(
                *(
                    self._hedged(operation, subject, request, budget_s, latencies)
                    for subject, request in requests.values()
                )
            )
        replies: dict[str, Any] = {}
        errors: dict[str, MnemeshError] = {}
        for name, outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, ABOUT_THE_REQUEST):
                raise outcome
            if isinstance(outcome, MnemeshError):
                errors[name] = outcome
            else:
                replies[name] = outcome
        return Gathered(replies, errors)

    async def _hedged(
        self, operation: AnyOperation, subject: str, request: object, budget_s: float, latencies: Latencies
    ) -> Any:
        loop = asyncio.get_running_loop()
        began = loop.time()
        asks = {asyncio.ensure_future(self._settled(operation, subject, request, budget_s))}
        patience = latencies.hedge_after()
        outcome: Any = None
        try:
            while asks:
                done, asks = await asyncio.wait(asks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    patience = None
                    latencies.hedged += 1
                    left = budget_s - (loop.time() - began)
                    asks.add(asyncio.ensure_future(self._settled(operation, subject, request, left)))
                for ask in done:
                    outcome = ask.result()
                    if not isinstance(outcome, MnemeshError):
                        latencies.observe(loop.time() - began)
                        return outcome
            return outcome
        finally:
            for ask in asks:
                ask.cancel()

    async def _settled(self, operation: AnyOperation, subject: str, request: object, budget_s: float) -> Any:
        try:
            return await self._asker.ask(operation, subject, request, budget_s=budget_s)
        except MnemeshError as error:
            return error


class Latencies:
    """The recent latencies of one operation, and how many of its requests were hedged."""

    def __init__(self) -> None:
        self.hedged = 0
        self._count = 0
        self._recent: deque[float] = deque(maxlen=_OBSERVED)
        self._p95: float | None = None

    def observe(self, seconds: float) -> None:
        self._count += 1
        self._recent.append(seconds)
        if self._count % _RECOMPUTED_EVERY == 0:
            self._p95 = sorted(self._recent)[int(len(self._recent) * 0.95)]

    def hedge_after(self) -> float | None:
        """Seconds to wait before a hedge; `None` while there is nothing to go by or the allowance is used up."""
        return self._p95 if self.hedged < self._count * HEDGED_AT_MOST else None


def coverage(
    shards: Mapping[str, ShardEntry], errors: Mapping[str, MnemeshError], sites: Sequence[SiteCoverage] = ()
) -> Coverage:
    """Which share of all partitions is answered for, when `errors` holds the shards that are not, and which sites."""
    missing = [
        Missing(shard=name, partitions=len(shards[name].partitions), code=error.code, message=error.message)
        for name, error in sorted(errors.items())
    ]
    served: set[int] = set()
    for shard in shards.values():
        served |= shard.partitions
    if len(served) < PARTITIONS:
        missing.append(
            Missing(
                shard="",
                partitions=PARTITIONS - len(served),
                code=Unavailable.code,
                message="no shard of the shard map serves these partitions",
            )
        )
    return Coverage(
        answered=PARTITIONS - sum(part.partitions for part in missing),
        total=PARTITIONS,
        missing=missing,
        sites=list(sites),
    )


def lowest(replies: Mapping[str, Any]) -> Token:
    """The watermark of a federated reply: for each site the lowest that any shard's reply saw."""
    watermark: Token = {}
    for reply in replies.values():
        for site, sequence in reply.watermark.items():
            watermark[site] = min(sequence, watermark.get(site, sequence))
    return watermark


def raise_if_nothing(gathered: Gathered) -> None:
    """When no shard answered there is no partial answer to give: raise what the shards said.

    The most telling error first: one that is about the request, else that the shards cannot be reached.
    """
    if gathered.replies or not gathered.errors:
        return
    errors = sorted(gathered.errors.values(), key=lambda error: (error.retryable, error.code == NotFound.code))
    raise errors[0]
