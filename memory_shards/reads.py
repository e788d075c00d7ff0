"""What a shard answers from its stores: reads of one entity, parts of questions that span shards, what sites exchange.

    wait as fresh as demanded → read the store → say the watermark that was read

What is demanded a request says, and the site's policy of reads (`demand`). Which rule of it a point read is under shows
only in what is read: where that demands more than was waited for, it is waited for, and read again. How the stores come
to be as fresh is the shard's life (`shard`). Looks at `stores`, `freshness`, `demand`, `elsewhere` and `mnemesh`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import accumulate
from typing import TypeVar

from msgspec.structs import replace

from memory_shards import elsewhere
from memory_shards.demand import ReadPolicy, Types, lag_ms, read_as_demanded
from memory_shards.elsewhere import OF_HUB, Elsewhere
from memory_shards.freshness import Freshness
from memory_shards.merge import Document
from memory_shards.outside import OutsideProjection
from memory_shards.stores import Facet, VectorQuery
from memory_shards.stores.by_url import Stores
from memory_shards.stores.embedded import EmbeddedMemory
from memory_shards.stores.sqlite import SqliteStore
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.clock import to_ms
from mnemesh.errors import BadRequest, NotFound, Unavailable
from mnemesh.ids import from_token, partition_of_tokens, to_token
from mnemesh.jetstream import last_of

Result = TypeVar("Result")

MOST_BYTES_LISTED = 2 * 1024 * 1024


class Reads(Actor):
    """The reading half of a shard, whose life is `shard.Shard`."""

    site: str
    _log: str
    _reads: ReadPolicy
    _elsewhere: Elsewhere | None
    _freshness: Freshness

    @property
    @abstractmethod
    def stores(self) -> Stores:
        """The stores as they are read now."""

    # ── point reads ─────────────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.GET_CONTEXT)
    async def get_context(self, request: messages.GetContext, call: Call) -> messages.Context:
        entity_id = _entity_id(request.entity_id, call)
        tenant = call.caller.tenant
        here = partial(self._get_context, entity_id, request, call)
        if self._elsewhere is None:
            return await here()
        if request.consistency is not None:
            await self._fresh(request.consistency.of_site(self.site), call, self.stores.documents)
        held, last_own = await self._once_known(
            lambda: self._device.held_or_own(tenant, entity_id), lambda told: told[0], request.consistency, call
        )
        try:
            if held:
                return await here()
        except NotFound:
            held, last_own = self._device.held_or_own(tenant, entity_id)
            if held:
                raise  # else it was let go meanwhile
        if last_own is not None:  # for then the hub is told a token, and what a request demands goes before its policy
            request = replace(request, consistency=self._demand(request.consistency, call))
        return await elsewhere.get_context(
            self._elsewhere,
            replace(request, entity_id=entity_id),
            call,
            own=None if last_own is None else (self.site, last_own),
            types=lambda: self._device.describe(tenant, [entity_id])[0].types,
            here=here,
        )

    async def _get_context(self, entity_id: str, request: messages.GetContext, call: Call) -> messages.Context:
        tenant = call.caller.tenant

        async def read() -> tuple[Document | None, Types]:
            document = await self.stores.documents.get(
                tenant,
                entity_id,
                as_of_ms=to_ms(request.as_of) if request.as_of else None,
                valid_at_ms=to_ms(request.valid_at) if request.valid_at else None,
            )
            return document, () if document is None else (document.type,)

        demand, seen, document = await self._read_of(request.consistency, call, read)
        if document is None:
            raise NotFound(f"nothing is remembered of {entity_id[:200]!r} (as of {self.site} {seen[self.site]})")
        edges, latest = document.edges, document.version
        missing = []
        if edges is None:
            try:
                places = await self._fresh(demand, call, self.stores.edges)
                edges, at = await self.stores.edges.edges_of(tenant, entity_id)
            except Unavailable:
                edges, missing = [], ["edges"]
            else:
                seen = self._freshness.seen(min(places[self.site], seen[self.site]), demand)
                latest = max(latest, at)
        vectors = None
        if request.include_vectors:
            await self._fresh(demand, call, self.stores.vectors)
            vectors, at = await self.stores.vectors.vectors_of(tenant, entity_id)
            seen = self._freshness.seen(min(at, seen[self.site]), demand)
            latest = max(latest, at)
        suspects = None
        if request.include_suspects:
            suspects = await self.stores.documents.suspects(tenant, entity_id)
        return messages.Context(
            entity_id=document.entity_id,
            type=document.type,
            attributes=document.attributes,
            edges=edges,
            spaces=document.spaces,
            text=document.text,
            version=document.version,
            watermark=seen,
            latest=latest,
            missing=missing,
            vectors=vectors,
            suspects=suspects,
        )

    @handles(subjects.TIMELINE)
    async def timeline(self, request: messages.Timeline, call: Call) -> messages.TimelinePage:
        entity_id = _entity_id(request.entity_id, call)
        tenant = call.caller.tenant
        if self._elsewhere is not None:
            is_here = await self._once_known(
                lambda: self._device.holds(tenant, entity_id) or self._device.timeline(tenant, entity_id, 0, 1),
                bool,
                request.consistency,
                call,
            )
            if request.after >= OF_HUB or not is_here:
                return await elsewhere.timeline(self._elsewhere, replace(request, entity_id=entity_id), call)

        async def read() -> tuple[messages.TimelinePage, Types]:
            complete = self._has_all_of(tenant, entity_id)
            events = await self.stores.documents.timeline(tenant, entity_id, request.after, request.limit)
            complete = complete and self._has_all_of(tenant, entity_id)
            page = replace(_page(events, request.limit, {}), complete=complete)
            if self._reads.rules(tenant).says_nothing:
                return page, ()
            (told,) = await self.stores.documents.describe(tenant, [entity_id])
            return page, told.types or ((told.type,) if told.sites else ())

        _, seen, page = await self._read_of(request.consistency, call, read)
        return replace(page, watermark=seen)

    # ── parts of questions that span shards ─────────────────────────────────────────────────────────────────

    @handles(subjects.SHARD_TIMELINE_RANGE)
    async def timeline_range(self, request: messages.TimelineRange, call: Call) -> messages.TimelinePage:
        demand = self._demand(request.consistency, call, request.type)
        seen = await self._fresh(demand, call, self.stores.documents)
        events = await self.stores.documents.timeline_range(
            call.caller.tenant,
            to_ms(request.start) if request.start else None,
            to_ms(request.end) if request.end else None,
            request.type,
            request.after,
            request.limit,
        )
        return _page(events, request.limit, seen)

    @handles(subjects.SHARD_SEARCH)
    async def search(self, request: messages.SearchEmbedding, call: Call) -> messages.Hits:
        demand = self._demand(request.consistency, call, request.type)
        await self._fresh(demand, call, self.stores.vectors)
        query = VectorQuery(
            tenant=call.caller.tenant,
            space=request.space,
            vector=request.vector,
            k=request.k,
            type=request.type,
            filter=request.filter,
            output_fields=request.output_fields,
            include_vectors=request.include_vectors,
        )
        found = await self.stores.vectors.search(query)
        seen = self._freshness.seen(found.at, demand)
        return messages.Hits(hits=found.hits, watermark=seen, latest=found.latest)

    @handles(subjects.SHARD_SEARCH_TEXT)
    async def search_text(self, request: messages.SearchText, call: Call) -> messages.Hits:
        demand = self._demand(request.consistency, call, request.type)
        seen = await self._fresh(demand, call, self.stores.texts)
        hits, latest = await self.stores.texts.search_text(call.caller.tenant, request.query, request.k, request.type)
        return messages.Hits(hits=hits, watermark=seen, latest=latest)

    @handles(subjects.SHARD_EXPAND)
    async def expand(self, request: messages.Expand, call: Call) -> messages.Expanded:
        seen = await self._fresh(self._demand(request.consistency, call), call, self.stores.edges)
        tenant, entity_ids = call.caller.tenant, request.entity_ids
        walk = await self.stores.edges.expand(
            tenant, entity_ids, request.relations, request.direction, request.limit, request.ahead
        )
        return messages.Expanded(
            edges=walk.edges,
            truncated=walk.truncated,
            ahead=walk.ahead,
            lacking=[each for each in (*entity_ids, *walk.ahead) if not self._has_all_of(tenant, each)],
            watermark=seen,
            latest=walk.latest,
        )

    # ── what others exchange about what is here ─────────────────────────────────────────────────────────────
    # Services of the site ask, and name the sequence that they ask about: no rule adds to that.

    @handles(subjects.SHARD_LIST)
    async def list_entities(self, request: messages.ListEntities, call: Call) -> messages.Entities:
        seen = await self._fresh(
            request.consistency or self._demand(None, call, *request.types), call, self.stores.documents
        )
        found = await self.stores.documents.list_entities(
            call.caller.tenant,
            request.after,
            request.limit,
            types=request.types,
            held=request.held,
            with_sites=request.with_sites,
        )
        fitting = _fitting(found)
        more = len(found) == request.limit or len(fitting) < len(found)
        return messages.Entities(entities=fitting, more=more, watermark=seen)

    @handles(subjects.SHARD_DESCRIBE)
    async def describe(self, request: messages.Describe, call: Call) -> messages.Descriptions:
        seen = await self._fresh(request.consistency or self._demand(None, call), call, self.stores.documents)
        found = await self.stores.documents.describe(call.caller.tenant, request.entity_ids)
        return messages.Descriptions(entities=found, watermark=seen)

    @handles(subjects.SHARD_HELD)
    async def held(self, request: messages.AskHeld, call: Call) -> messages.Held:
        entities, size = await self.stores.documents.held()
        return messages.Held(entities=entities, bytes=size)

    @handles(subjects.SHARD_ERASED)
    async def erased(self, request: messages.AskErased, call: Call) -> messages.Erased:
        """What is left is of the documents' watermark or later, which is the one that is told."""
        applied = messages.Consistency(level="session", token={self.site: request.sequences[-1]})
        for facet in self.stores.facets:
            await self._fresh(applied, call, facet)
        seen = await self._fresh(applied, call, self.stores.documents)
        asked = call.caller.tenant, request.entity_id, request.sequences
        events, has, left = await self.stores.documents.erased(*asked)
        return messages.Erased(events=events, has=has, left=left, watermark=seen)

    @handles(subjects.SHARD_FORGOTTEN)
    async def forgotten(self, request: messages.AskForgotten, call: Call) -> messages.Forgotten:
        applied = messages.Consistency(level="session", token={self.site: request.sequences[-1]})
        seen = await self._fresh(applied, call, self.stores.documents)
        found = await self.stores.documents.forgotten(request.sequences)
        return messages.Forgotten(sequences=found, watermark=seen)

    # ── how fresh, and whether all of it ────────────────────────────────────────────────────────────────────

    async def _fresh(self, consistency: messages.Consistency | None, call: Call, *facets: Facet) -> messages.Token:
        """Wait until these stores are as fresh as is demanded. What a read of all of them then sees.

        Raises `Unavailable` at once where one is known not to be there, `Stale` in time.
        """
        places = []
        for projection in dict.fromkeys(facet.projection for facet in facets):
            if isinstance(projection, OutsideProjection):
                await projection.ready(call.deadline)
            places.append((await self._freshness.wait(consistency, projection.watermark, call))[self.site])
        return self._freshness.seen(min(places), consistency)

    def _demand(self, asked: messages.Consistency | None, call: Call, *types: str | None) -> messages.Consistency:
        """What a read of many entities demands: of these types, or of any if it names none."""
        return self._reads.rules(call.caller.tenant).demand(asked, [type for type in types if type is not None])

    async def _read_of(
        self, asked: messages.Consistency | None, call: Call, read: Callable[[], Awaitable[tuple[Result, Types]]]
    ) -> tuple[messages.Consistency | None, messages.Token, Result]:
        """Read what the documents have of the entity that a call is about: what was waited for, seen and read."""
        rules = self._reads.rules(call.caller.tenant)
        if rules.says_nothing:
            seen = await self._fresh(asked, call, self.stores.documents)
            return asked, seen, (await read())[0]
        return await read_as_demanded(
            rules,
            asked,
            fresh=lambda demand: self._fresh(demand, call, self.stores.documents),
            read=read,
            has_all=partial(self._has_all_in_log, call),
        )

    async def _has_all_in_log(self, call: Call, seen: messages.Token) -> bool:
        """Whether a read that saw so much saw all events of the entity that a call is about."""

        async def last_of_it() -> int:
            tenant, token = call.caller.tenant, call.tokens["entity"]
            subject = subjects.log_event("*", tenant, partition_of_tokens(tenant, token), token)
            try:
                return (await last_of(self.asker.inbox, self._log, subject)).sequence
            except NotFound:
                return 0

        return await self._freshness.has_all(seen[self.site], last_of_it, call)

    async def _once_known(
        self,
        look: Callable[[], Result],
        is_here: Callable[[Result], object],
        asked: messages.Consistency | None,
        call: Call,
    ) -> Result:
        """What a device's own documents say of an entity; that it is not here only once they are as fresh as any rule
        demands."""
        found = look()
        demand = self._demand(asked, call)
        if not is_here(found) and lag_ms(demand) < float("inf"):
            await self._fresh(demand.of_site(self.site), call, self.stores.documents)
            found = look()
        return found

    @property
    def _device(self) -> SqliteStore:
        """A device's documents, which know what of the hub's they hold."""
        assert isinstance(self.stores.documents, EmbeddedMemory), "a device keeps what it knows in itself"
        return self.stores.documents.store

    def _has_all_of(self, tenant: str, entity_id: str) -> bool:
        """Whether nobody else knows more of it: a hub is asked by its devices, a device holds some."""
        return self._elsewhere is None or self._device.holds(tenant, entity_id)


def _fitting(entities: list[messages.ListedEntity]) -> list[messages.ListedEntity]:
    """As many as a reply takes, for an id may have 16 KiB."""
    sizes = accumulate(len(entity.entity_id.encode()) for entity in entities)
    return [entity for entity, size in zip(entities, sizes, strict=True) if size <= MOST_BYTES_LISTED]


def _page(events: list[messages.TimelineEvent], limit: int, seen: messages.Token) -> messages.TimelinePage:
    more = len(events) == limit
    return messages.TimelinePage(events=events, next_after=events[-1].sequence if more else None, watermark=seen)


def _entity_id(named: str | None, call: Call) -> str:
    """The id that a point read is about: its token's, and the request's own where the token is a digest."""
    token = call.tokens["entity"]
    if named is None:
        entity_id = from_token(token)
        if entity_id is None:
            raise BadRequest("the subject holds a digest of the id, so the request must name entity_id")
        return entity_id
    if to_token(named) != token:
        raise BadRequest(f"entity_id {named[:200]!r} is not the one that the subject is about")
    return named
