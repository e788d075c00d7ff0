"""The router: questions that span shards. It scatters them, merges the answers, and says what they cover.

Unless it is asked about what is `here`, other sites are asked beside the shards (`peers`). A partial answer is never
dressed as whole: `coverage` names each shard that did not answer and why, and each site. Only when nobody answered is
the reply an error.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from math import isfinite
from typing import Any

from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.errors import BadRequest, MnemeshError, NotFound, Unavailable
from mnemesh.guard import Guard
from mnemesh.ids import to_token
from mnemesh.wire import as_vector
from router.peers import Answer, Peers
from router.scatter import Gathered, Scatter, coverage, lowest, raise_if_nothing
from router.shard_map import ShardMap
from router.traversal import Walk


class Router(Actor):
    """Answers questions that span shards."""

    role = "router"

    def __init__(self, link: Link, *, peers: Peers, guard: Guard | None = None) -> None:
        super().__init__(link, guard=guard)
        self._peers = peers
        self._map = ShardMap()
        self._scatter = Scatter(self.asker)

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {
            "shard_map": partial(self._map.follow, self.link, self.asker.inbox),
            "peers": partial(self._peers.follow, self.asker),
        }

    async def ready(self) -> None:
        await self._map.ready.wait()
        await self._peers.ready()

    @handles(subjects.SEARCH_EMBEDDING)
    async def search_embedding(self, request: messages.SearchEmbedding, call: Call) -> messages.Hits:
        as_vector(request.vector)
        gathered, answers = await asyncio.gather(
            self._ask_all(subjects.SHARD_SEARCH, subjects.shard_search, request, call),
            self._peers.ask("search", request, call),
        )
        return self._merged(_without_absent(gathered, answers), answers, request.k)

    @handles(subjects.SEARCH_TEXT)
    async def search_text(self, request: messages.SearchText, call: Call) -> messages.Hits:
        gathered, answers = await asyncio.gather(
            self._ask_all(subjects.SHARD_SEARCH_TEXT, subjects.shard_search_text, request, call),
            self._peers.ask("search_text", request, call),
        )
        return self._merged(gathered, answers, request.k)

    @handles(subjects.TIMELINE_RANGE)
    async def timeline_range(self, request: messages.TimelineRange, call: Call) -> messages.TimelinePage:
        gathered = await self._ask_all(subjects.SHARD_TIMELINE_RANGE, subjects.shard_timeline_range, request, call)
        raise_if_nothing(gathered)
        pages = gathered.replies.values()
        watermark = lowest(gathered.replies)
        # Beyond where the slowest shard stands it may still have events that belong before those of the others.
        end = min(watermark.values())
        merged = heapq.merge(*(page.events for page in pages), key=lambda event: event.sequence)
        known = list(takewhile(lambda event: event.sequence <= end, merged))
        events = known[: request.limit]
        more = len(known) > len(events) or any(page.next_after is not None and page.next_after < end for page in pages)
        return messages.TimelinePage(
            events=events,
            next_after=events[-1].sequence if more else None,
            watermark=watermark,
            coverage=coverage(self._map.shards, gathered.errors),
        )

    @handles(subjects.TRAVERSE)
    async def traverse(self, request: messages.Traverse, call: Call) -> messages.Traversal:
        starts = [request.start] if isinstance(request.start, str) else request.start
        if not starts:
            raise BadRequest("traverse needs at least one start")
        for start in starts:
            to_token(start)
        self._require_shards()
        return await Walk(self._scatter, self._map, self._peers, request, call).run()

    def _require_shards(self) -> None:
        if not self._map.shards:
            raise Unavailable("the shard map is empty: no shard has been set up", retry_after_ms=500)

    async def _ask_all(
        self, operation: AnyOperation, subject: Callable[[str, str, str], str], request: Any, call: Call
    ) -> Gathered:
        self._require_shards()
        shards = self._map.shards
        caller = call.caller
        return await self._scatter.ask(
            operation,
            {name: (subject(name, caller.tenant, caller.agent), request) for name in shards},
            shards,
            call,
        )

    def _merged(self, gathered: Gathered, answers: Sequence[Answer], k: int) -> messages.Hits:
        """The k best of all; equal scores in the order of their ids, so that the answer is stable.

        What was found here counts as it is here. Of an entity that other sites have alone, the best score counts.
        """
        raise_if_nothing(gathered)
        here = gathered.replies.values()
        elsewhere = [answer.reply for answer in answers if answer.reply is not None]
        best: dict[str, messages.Hit] = {}
        for replies in (here, elsewhere):
            for hit in sorted((hit for reply in replies for hit in reply.hits if isfinite(hit.score)), key=_by_score):
                best.setdefault(hit.entity_id, hit)
        return messages.Hits(
            hits=sorted(best.values(), key=_by_score)[:k],
            watermark=lowest(gathered.replies),
            latest=max((reply.latest for reply in gathered.replies.values()), default=0),
            coverage=coverage(self._map.shards, gathered.errors, [answer.coverage for answer in answers]),
        )


def _by_score(hit: messages.Hit) -> tuple[float, str]:
    return -hit.score, hit.entity_id


def _without_absent(gathered: Gathered, answers: Sequence[Answer]) -> Gathered:
    """A shard that has no vector of a space has answered, with nothing; unless nobody at all knows the space.

    A site that did not answer may know it, and one that answers with an error does.
    """
    absent = {name: error for name, error in gathered.errors.items() if isinstance(error, NotFound)}
    sites = [answer.coverage for answer in answers]
    maybe = any(answer.reply is not None for answer in answers) or any(
        site.state != "answered" or site.code for site in sites
    )
    if len(absent) == len(gathered.errors) and not gathered.replies and not maybe:
        return gathered
    empty: MnemeshError | messages.Hits = messages.Hits(hits=[], watermark={})
    return Gathered(
        gathered.replies | dict.fromkeys(absent, empty),
        {name: error for name, error in gathered.errors.items() if name not in absent},
    )
