"""The shard: one replica of some partitions. It follows its site's log and answers reads from its stores.

Every replica of a shard reads the same log and listens in the same queue group; none is the leader. Its life:

    prepare   which log is it, open the stores (they empty themselves if they were built for another)
    follow    messages of the log → records of our partitions → every projection
    serve     wait as fresh as demanded → read the store → say the watermark that was read
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, TypeVar

from msgspec.structs import replace

from memory_shards import elsewhere
from memory_shards import folder as folders
from memory_shards.batcher import Batcher
from memory_shards.elsewhere import OF_HUB, Elsewhere
from memory_shards.freshness import Freshness, LogHead
from memory_shards.intake import Intake
from memory_shards.origins import Origins
from memory_shards.projection import Projection
from memory_shards.stores.faiss_cpu import FaissStore, VectorQuery
from memory_shards.stores.sqlite import SqliteStore
from memory_shards.stores.sqlite_reader import SqliteReader
from memory_shards.stores.sqlite_schema import is_corrupt
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.clock import to_ms
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.errors import BadRequest, NotFound
from mnemesh.follower import Follower
from mnemesh.guard import Guard
from mnemesh.ids import from_token, partition_of, to_token
from mnemesh.jetstream import last_of_each, stream_state
from mnemesh.stats import Gauge
from mnemesh.supervision import Escalated
from mnemesh.wire import Vector

logger = logging.getLogger("mnemesh.shard")

Count = TypeVar("Count")
Result = TypeVar("Result")

MOST_FOLLOWED = 1000
MOST_DOCUMENTS_APPLIED = 4000
"""Records in one transaction of the documents where they lag: no read waits for it, and pages that many events touch
are written once."""

MOST_VECTORS_APPLIED = 250
"""Records in one transaction of the vector store: about 8 ms of its worker, which searches wait for."""

MOST_BYTES_LISTED = 2 * 1024 * 1024
MOST_IDS_ON_LOOP = 200
MOST_EDGES_ON_LOOP = 1000
"""A walk that is wider goes to the scanning thread: at 2 µs an edge it would hold up the loop."""


class Shard(Actor):
    """Serves some partitions of the memory from stores that follow the log.

    That of a device has a `hub`: it holds what was written there, and of the rest what the device wants.
    """

    role = "shard"

    def __init__(
        self,
        link: Link,
        *,
        name: str,
        site: str,
        partitions: Iterable[int],
        folder: Path,
        guard: Guard | None = None,
        hub: Elsewhere | None = None,
    ) -> None:
        super().__init__(link, guard=guard)
        self._elsewhere = hub
        self.name = name
        self.site = site
        self.partitions = frozenset(partitions)
        self._folder = folder
        self._log = subjects.log_stream(site)
        self._projections: tuple[Projection, ...] = ()
        self._lock: IO[str] | None = None
        origins = Origins(may_go_back=hub is not None)  # a device does not go on from an older copy
        self._intake = Intake(
            site=site, kind="hub" if hub is None else "device", partitions=self.partitions, origins=origins
        )
        self._freshness = Freshness(site, LogHead(self._ask_head), origins)
        self._scanner = ThreadPoolExecutor(1, thread_name_prefix="scan-documents")
        self._searches: Batcher[VectorQuery, tuple[list[messages.Hit], int]] = Batcher(self._search)

    # ── what the runtime asks ───────────────────────────────────────────────────────────────────────────────

    def bindings(self, operation: AnyOperation) -> Iterable[Mapping[str, str]]:
        if "partition" in operation.positions:
            return [{"site": self.site, "partition": str(partition)} for partition in self.partitions]
        return [{"shard": self.name, "site": self.site}]

    def queue(self, operation: AnyOperation) -> str:
        """Replicas share the requests, but each tells its own status."""
        return self.instance if operation is subjects.SHARD_STATUS else f"shard-{self.name}"

    def metadata(self) -> dict[str, str]:
        return {"shard": self.name, "site": self.site, "partitions": str(len(self.partitions))}

    def gauges(self) -> list[Gauge]:
        gauges = [
            Gauge("undecodable_events", "Events of the log that could not be read", lambda: self._intake.undecodable)
        ]
        if self._projections:
            gauges += [
                Gauge(
                    "quarantined_events",
                    "Events that are stamped too far ahead and have no effect",
                    lambda count=count: count,  # type: ignore[misc]
                    {"site": site},
                )
                for site, count in self._documents.quarantined.items()
            ]
        for projection in self._projections:
            gauges.append(
                Gauge(
                    f"{projection.name}_watermark",
                    f"Last log sequence applied to the {projection.name}",
                    lambda projection=projection: projection.watermark.value,  # type: ignore[misc]
                )
            )
            gauges.append(
                Gauge(
                    f"{projection.name}_applied",
                    f"Events applied to the {projection.name} since the start",
                    lambda projection=projection: projection.applied,  # type: ignore[misc]
                )
            )
        return gauges

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        applying = {f"apply.{projection.name}": projection.run for projection in self._projections}
        return {"follow": self._follow, "search": self._searches.run, **applying}

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        self._lock = await folders.hold(self._folder)
        for stored in await last_of_each(self.asker.inbox, self._log, subjects.log_mark("*")):
            self._intake.note(stored)
        state = await stream_state(self.asker.inbox, self._log)
        self._incarnation = state.incarnation
        try:
            self._open_stores()
        except sqlite3.DatabaseError as error:
            self.failed(error)
            raise
        if max(self._documents.watermark, self._vectors.watermark) > state.last_sequence:
            logger.warning("%s ends before what this shard has applied; its stores start from empty", self._log)
            self._scanned.close()
            self._documents.close()
            self._vectors.close()
            folders.clear(self._folder)
            self._open_stores()
        self._document_projection = Projection("documents", self._documents, most=MOST_DOCUMENTS_APPLIED)
        self._vector_projection = Projection("vectors", self._vectors, most=MOST_VECTORS_APPLIED)
        self._projections = (self._document_projection, self._vector_projection)

    def _open_stores(self) -> None:
        origin = self._incarnation
        self._documents = SqliteStore(self._folder, site=self.site, partitions=self.partitions, incarnation=origin)
        self._scanned = self._documents.reader()
        self._vectors = FaissStore(self._folder, self.partitions, site=self.site, incarnation=origin)

    async def release(self) -> None:
        if self._projections:
            await self._scan(self._scanned.close)
        self._scanner.shutdown(wait=True)
        for projection in self._projections:
            await projection.close()
        if self._lock is not None:
            self._lock.close()

    def failed(self, error: BaseException) -> None:
        """A file that cannot be read any more is not repaired: the next start begins from empty and reads the log."""
        if is_corrupt(error):
            folders.condemn(self._folder)
            raise Escalated(f"a store in {self._folder} is corrupt; the next start rebuilds it from the log") from error

    async def _follow(self) -> None:
        """Bring every event of our partitions to every projection, from where the slowest one stands."""
        after = min(projection.offered for projection in self._projections)
        follower = Follower(self.link, self.asker.inbox, self._log, after=after, incarnation=self._incarnation)
        async for batch in follower.batches(MOST_FOLLOWED):
            records = self._intake.records(batch)
            for projection in self._projections:
                await projection.offer(records, batch[-1].sequence)

    async def _scan(self, work: Callable[..., Result], *arguments: object) -> Result:
        """A long read of `self._scanned`, on its thread: neither the loop nor `apply` waits for it, nor it for them."""
        return await asyncio.get_running_loop().run_in_executor(self._scanner, work, *arguments)

    async def _ask_head(self) -> int:
        return (await stream_state(self.asker.inbox, self._log)).last_sequence

    # ── point reads ─────────────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.GET_CONTEXT)
    async def get_context(self, request: messages.GetContext, call: Call) -> messages.Context:
        entity_id = _entity_id(request.entity_id, call)
        tenant = call.caller.tenant
        here = partial(self._get_context, entity_id, request, call)
        if self._elsewhere is None:
            return await here()
        if request.consistency is not None:
            own = request.consistency.of_site(self.site)
            await self._freshness.wait(own, self._document_projection.watermark, call)
        held, last_own = self._documents.held_or_own(tenant, entity_id)
        try:
            if held:
                return await here()
        except NotFound:
            held, last_own = self._documents.held_or_own(tenant, entity_id)
            if held:
                raise  # else it was let go meanwhile
        return await elsewhere.get_context(
            self._elsewhere,
            replace(request, entity_id=entity_id),
            call,
            own=None if last_own is None else (self.site, last_own),
            types=lambda: self._documents.describe(tenant, [entity_id])[0].types,
            here=here,
        )

    async def _get_context(self, entity_id: str, request: messages.GetContext, call: Call) -> messages.Context:
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        document = self._documents.get(
            call.caller.tenant,
            entity_id,
            as_of_ms=to_ms(request.as_of) if request.as_of else None,
            valid_at_ms=to_ms(request.valid_at) if request.valid_at else None,
        )
        if document is None:
            raise NotFound(f"nothing is remembered of {entity_id[:200]!r} (as of {self.site} {seen[self.site]})")
        vectors, latest = None, document.version
        if request.include_vectors:
            await self._freshness.wait(request.consistency, self._vector_projection.watermark, call)
            vectors, at = await self._vector_projection.on_worker(self._vectors_of, call.caller.tenant, entity_id)
            seen = self._freshness.seen(min(at, seen[self.site]), request.consistency)
            latest = max(latest, at)
        suspects = None
        if request.include_suspects:
            suspects = await self._scan(self._scanned.suspects, call.caller.tenant, entity_id)
        return messages.Context(
            entity_id=document.entity_id,
            type=document.type,
            attributes=document.attributes,
            edges=document.edges,
            spaces=document.spaces,
            text=document.text,
            version=document.version,
            watermark=seen,
            latest=latest,
            vectors=vectors,
            suspects=suspects,
        )

    def _vectors_of(self, tenant: str, entity_id: str) -> tuple[dict[str, Vector], int]:
        """An entity's vectors, and where the store of vectors stands. On its thread."""
        at = self._vector_projection.stands_at
        return self._vectors.vectors_of(tenant, entity_id), at

    @handles(subjects.TIMELINE)
    async def timeline(self, request: messages.Timeline, call: Call) -> messages.TimelinePage:
        entity_id = _entity_id(request.entity_id, call)
        tenant = call.caller.tenant
        if self._elsewhere is not None:
            is_here = self._documents.holds(tenant, entity_id) or self._documents.timeline(tenant, entity_id, 0, 1)
            if request.after >= OF_HUB or not is_here:
                return await elsewhere.timeline(self._elsewhere, replace(request, entity_id=entity_id), call)
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        complete = self._elsewhere is None or self._documents.holds(tenant, entity_id)
        events = self._documents.timeline(tenant, entity_id, request.after, request.limit)
        complete = complete and (self._elsewhere is None or self._documents.holds(tenant, entity_id))
        return replace(_page(events, request.limit, seen), complete=complete)

    # ── parts of questions that span shards ─────────────────────────────────────────────────────────────────

    @handles(subjects.SHARD_TIMELINE_RANGE)
    async def timeline_range(self, request: messages.TimelineRange, call: Call) -> messages.TimelinePage:
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        events = await self._scan(
            self._scanned.timeline_range,
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
        await self._freshness.wait(request.consistency, self._vector_projection.watermark, call)
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
        hits, at = await self._searches.ask(query)
        return messages.Hits(hits=hits, watermark=self._freshness.seen(at, request.consistency), latest=at)

    async def _search(self, queries: Sequence[VectorQuery]) -> Sequence[tuple[list[messages.Hit], int] | Exception]:
        return await self._vector_projection.on_worker(self._searched, queries)

    def _searched(self, queries: Sequence[VectorQuery]) -> list[tuple[list[messages.Hit], int] | Exception]:
        """The answers, and where the store of vectors stands: what waited for it may see more than it asked for."""
        at = self._vector_projection.stands_at
        answers = self._vectors.search(queries)
        return [answer if isinstance(answer, Exception) else (answer, at) for answer in answers]

    @handles(subjects.SHARD_SEARCH_TEXT)
    async def search_text(self, request: messages.SearchText, call: Call) -> messages.Hits:
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        asked = call.caller.tenant, request.query, request.k, request.type
        hits, latest = await self._scan(_and_latest, self._scanned, self._scanned.search_text, *asked)
        return messages.Hits(hits=hits, watermark=seen, latest=latest)

    @handles(subjects.SHARD_EXPAND)
    async def expand(self, request: messages.Expand, call: Call) -> messages.Expanded:
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        asked = call.caller.tenant, request.entity_ids, request.relations, request.direction
        narrow = len(request.entity_ids) <= MOST_IDS_ON_LOOP
        if narrow:
            edges, truncated = self._documents.expand(*asked, min(request.limit, MOST_EDGES_ON_LOOP))
        if not narrow or (truncated and request.limit > MOST_EDGES_ON_LOOP):
            (edges, truncated), latest = await self._scan(
                _and_latest, self._scanned, self._scanned.expand, *asked, request.limit
            )
            lacking = [] if self._elsewhere is None else request.entity_ids
            return messages.Expanded(edges=edges, truncated=truncated, lacking=lacking, watermark=seen, latest=latest)
        ahead = self._walk_ahead(request, call.caller.tenant, edges)
        lacking = self._lacking(call.caller.tenant, [*request.entity_ids, *ahead])
        return messages.Expanded(
            edges=edges,
            truncated=truncated,
            ahead=ahead,
            lacking=lacking,
            watermark=seen,
            latest=self._documents.stands_at(),
        )

    def _lacking(self, tenant: str, entity_ids: Sequence[str]) -> list[str]:
        """Those of which a device's hub may know more."""
        if self._elsewhere is None:
            return []
        return [entity_id for entity_id in entity_ids if not self._documents.holds(tenant, entity_id)]

    def _walk_ahead(self, request: messages.Expand, tenant: str, edges: list[tuple[str, str, str]]) -> list[str]:
        """Add to `edges` those of the entities that they lead to and that are ours; returns these entities."""
        ahead: list[str] = []
        known = set(request.entity_ids)
        reached = edges
        for _ in range(request.ahead if request.direction == "out" else 0):
            frontier = [
                target
                for target in dict.fromkeys(far for _, _, far in reached)
                if target not in known and partition_of(tenant, target) in self.partitions
            ]
            if not 0 < len(frontier) <= MOST_IDS_ON_LOOP:
                break
            room = min(request.limit, MOST_EDGES_ON_LOOP) - len(edges)
            reached, truncated = self._documents.expand(tenant, frontier, request.relations, "out", room)
            if truncated:
                break
            edges += reached
            ahead += frontier
            known.update(frontier)
        return ahead

    # ── what others exchange about what is here ─────────────────────────────────────────────────────────────

    @handles(subjects.SHARD_LIST)
    async def list_entities(self, request: messages.ListEntities, call: Call) -> messages.Entities:
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        found = await self._scan(
            partial(
                self._scanned.list_entities,
                call.caller.tenant,
                request.after,
                request.limit,
                types=request.types,
                held=request.held,
                with_sites=request.with_sites,
            )
        )
        fitting = _fitting(found)
        more = len(found) == request.limit or len(fitting) < len(found)
        return messages.Entities(entities=fitting, more=more, watermark=seen)

    @handles(subjects.SHARD_DESCRIBE)
    async def describe(self, request: messages.Describe, call: Call) -> messages.Descriptions:
        seen = await self._freshness.wait(request.consistency, self._document_projection.watermark, call)
        found = await self._scan(self._scanned.describe, call.caller.tenant, request.entity_ids)
        return messages.Descriptions(entities=found, watermark=seen)

    @handles(subjects.SHARD_HELD)
    async def held(self, request: messages.AskHeld, call: Call) -> messages.Held:
        entities, size = await self._scan(self._scanned.held)
        return messages.Held(entities=entities, bytes=size)

    @handles(subjects.SHARD_ERASED)
    async def erased(self, request: messages.AskErased, call: Call) -> messages.Erased:
        """What is left is of the documents' watermark or later, which is the one that is told."""
        applied = messages.Consistency(level="session", token={self.site: request.sequences[-1]})
        await self._freshness.wait(applied, self._vector_projection.watermark, call)
        seen = await self._freshness.wait(applied, self._document_projection.watermark, call)
        asked = call.caller.tenant, request.entity_id, request.sequences
        events, has, left = await self._scan(self._scanned.erased, *asked)
        return messages.Erased(events=events, has=has, left=left, watermark=seen)

    @handles(subjects.SHARD_FORGOTTEN)
    async def forgotten(self, request: messages.AskForgotten, call: Call) -> messages.Forgotten:
        applied = messages.Consistency(level="session", token={self.site: request.sequences[-1]})
        seen = await self._freshness.wait(applied, self._document_projection.watermark, call)
        found = await self._scan(self._scanned.forgotten, request.sequences)
        return messages.Forgotten(sequences=found, watermark=seen)

    @handles(subjects.SHARD_STATUS)
    async def status(self, request: messages.Status, call: Call) -> messages.ShardStatus:
        """Counts are at least as new as the watermark. With a digest all of a store is told between two batches."""
        documents, vectors = self._document_projection, self._vector_projection
        counted = (
            documents.on_worker(_told, documents, lambda: _counts(self._documents), True)
            if request.digest
            else self._scan(_told, documents, self._scanned.counts, False)
        )
        ((entities, edges), document_digest, document_mark), (count, vector_digest, vector_mark) = await asyncio.gather(
            counted, vectors.on_worker(_told, vectors, self._vectors.count, request.digest)
        )
        return messages.ShardStatus(
            shard=self.name,
            watermark={self.site: min(document_mark, vector_mark)},
            partitions=len(self.partitions),
            entities=entities,
            edges=edges,
            vectors=count,
            skipped=self._intake.undecodable + self._documents.rejected,
            quarantined=dict(self._documents.quarantined),
            digest=f"{document_digest}-{vector_digest}" if request.digest else None,
        )


def _fitting(entities: list[messages.ListedEntity]) -> list[messages.ListedEntity]:
    """As many as a reply takes, for an id may have 16 KiB."""
    sizes = accumulate(len(entity.entity_id.encode()) for entity in entities)
    return [entity for entity, size in zip(entities, sizes, strict=True) if size <= MOST_BYTES_LISTED]


def _page(events: list[messages.TimelineEvent], limit: int, seen: messages.Token) -> messages.TimelinePage:
    more = len(events) == limit
    return messages.TimelinePage(events=events, next_after=events[-1].sequence if more else None, watermark=seen)


def _and_latest(reader: SqliteReader, read: Callable[..., Result], *arguments: object) -> tuple[Result, int]:
    """What is read, and the last place of the log that any of it may be from: that may be after what was waited for."""
    return read(*arguments), reader.stands_at()


def _told(projection: Projection, count: Callable[[], Count], digest: bool) -> tuple[Count, str, int]:
    """The counts, the digest and the watermark of a store, of one moment where this runs on the store's thread."""
    seen = projection.stands_at
    return count(), projection.store.digest() if digest else "", seen


def _counts(store: SqliteStore) -> tuple[int, int]:
    """The counts, on the worker's thread: the loop and the scanner have readers of their own."""
    with closing(store.reader()) as reader:
        return reader.counts()


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
