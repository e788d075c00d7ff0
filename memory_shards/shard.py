"""The shard: one replica of some partitions. It follows its site's log and answers reads from its stores.

Every replica of a shard reads the same log and listens in the same queue group; none is the leader. Its life:

    prepare   which log is it, open the stores (they empty themselves if they were built for another), start those that
              have nothing from a snapshot
    follow    messages of the log → records of our partitions → every projection
    serve     wait as fresh as demanded → read the store → say the watermark that was read

What is demanded a request says, and the site's policy of reads (`demand`). Which rule of it a point read is under shows
only in what is read: where that demands more than was waited for, it is waited for, and read again.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, TypeVar

from msgspec.structs import replace

from memory_shards import elsewhere
from memory_shards import folder as folders
from memory_shards.demand import NoPolicy, ReadPolicy, Types, lag_ms, read_as_demanded
from memory_shards.elsewhere import OF_HUB, Elsewhere
from memory_shards.freshness import Freshness, LogHead
from memory_shards.intake import Intake
from memory_shards.merge import Document
from memory_shards.origins import Origins
from memory_shards.outside import OutsideProjection
from memory_shards.rebuild import Rebuilds, generations_in
from memory_shards.served import Served
from memory_shards.snapshots.keeper import Snapshots, no_target
from memory_shards.snapshots.settings import NONE, SnapshotSettings
from memory_shards.snapshots.starting import check_for_hole, was_cut
from memory_shards.stores import Counted, Facet, VectorQuery
from memory_shards.stores.by_url import Origin, Stores, files_of, open_beside, open_stores
from memory_shards.stores.embedded import EmbeddedMemory
from memory_shards.stores.sqlite import SqliteStore
from memory_shards.stores.sqlite_schema import is_corrupt
from memory_shards.stores.urls import EMBEDDED, StoreUrls
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.clock import to_ms
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.errors import BadRequest, Conflict, NotFound, Unavailable
from mnemesh.event import Record
from mnemesh.follower import Follower
from mnemesh.guard import Guard
from mnemesh.ids import from_token, partition_of_tokens, to_token
from mnemesh.jetstream import last_of, last_of_each, stream_state
from mnemesh.lease import HELD, Lease
from mnemesh.stats import Gauge
from mnemesh.supervision import Escalated

logger = logging.getLogger("mnemesh.shard")

Result = TypeVar("Result")

MOST_FOLLOWED = 1000
MOST_BYTES_LISTED = 2 * 1024 * 1024


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
        stores: StoreUrls = EMBEDDED,
        reads: ReadPolicy | None = None,
        snapshots: SnapshotSettings = NONE,
    ) -> None:
        super().__init__(link, guard=guard)
        self._reads = reads or NoPolicy()
        self._elsewhere = hub
        self.name = name
        self.site = site
        self.partitions = frozenset(partitions)
        self._folder = folder
        self._urls = stores
        self._snapshot_settings = snapshots
        self._snapshots: Snapshots | None = None
        self._log = subjects.log_stream(site)
        self._opened: Served | None = None
        self._lock: IO[str] | None = None
        origins = Origins(may_go_back=hub is not None)  # a device does not go on from an older copy
        self._intake = Intake(
            site=site, kind="hub" if hub is None else "device", partitions=self.partitions, origins=origins
        )
        self._freshness = Freshness(site, LogHead(self._ask_head), origins)

    # ── what the runtime asks ───────────────────────────────────────────────────────────────────────────────

    def bindings(self, operation: AnyOperation) -> Iterable[Mapping[str, str]]:
        if "partition" in operation.positions:
            return [{"site": self.site, "partition": str(partition)} for partition in self.partitions]
        return [{"shard": self.name, "site": self.site}]

    def queue(self, operation: AnyOperation) -> str:
        """Replicas share the requests, but each tells its own status."""
        of_each = operation in (subjects.SHARD_STATUS, subjects.SHARD_REBUILD)
        return self.instance if of_each else f"shard-{self.name}"

    def metadata(self) -> dict[str, str]:
        return {"shard": self.name, "site": self.site, "partitions": str(len(self.partitions))}

    def gauges(self) -> list[Gauge]:
        gauges = [
            Gauge("undecodable_events", "Events of the log that could not be read", lambda: self._intake.undecodable)
        ]
        if self._opened is None:
            return gauges
        gauges += [
            Gauge(
                "quarantined_events",
                "Events that are stamped too far ahead and have no effect",
                lambda count=count: count,  # type: ignore[misc]
                {"site": site},
            )
            for site, count in self.stores.documents.quarantined.items()
        ]
        for projection in self.stores.projections:
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
        if self._snapshots is not None:
            gauges += self._snapshots.gauges()
        gauges += [
            Gauge(
                f"{outside.name}_breaker_open",
                f"1 while the store of the {outside.name} does not answer",
                lambda outside=outside: int(outside.breaker.is_open),  # type: ignore[misc]
            )
            for outside in self.stores.outside
        ]
        return gauges

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "follow": self._follow,
            "search": partial(self._served.keep, self.stores.vectors.projection.name, lambda vectors: vectors.run()),
            "read_policy": partial(self._reads.follow, self.link, self.asker.inbox),
            "rebuild": self._rebuilds.run,
            "generations": partial(self._rebuilds.follow, self.link),
        }
        for beside in self.stores.beside:
            works[f"apply.{beside.name}"] = beside.run
        for facet in self.stores.facets:
            name = facet.projection.name
            works[f"apply.{name}"] = partial(self._served.keep, name, self._apply)
        if any(outside.store.is_shared for outside in self.stores.outside):
            works["lease"] = self._lease.run
        if self._snapshots is not None:
            works["snapshots"] = partial(self._snapshots.run, lambda: files_of(self.stores))
        return works

    async def _apply(self, facet: Facet) -> None:
        """Keep a store up to date from the log, for ever."""
        if isinstance(facet.projection, OutsideProjection):
            lease = self._lease if facet.projection.store.is_shared else HELD
            await facet.projection.run(self._followed, self._ask_head, lease)
        else:
            await facet.projection.run()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        self._lock = await folders.hold(self._folder)
        for stored in await last_of_each(self.asker.inbox, self._log, subjects.log_mark("*")):
            self._intake.note(stored)
        state = await stream_state(self.asker.inbox, self._log)
        self._incarnation = state.incarnation
        generations = await generations_in(self.asker.inbox, subjects.GENERATIONS.name, self._place, self._folder)
        origin = Origin(self.site, self.name, self.partitions, state.incarnation, self._folder, generations)
        reopen = partial(open_stores, self._urls, origin)
        if self._snapshot_settings.url:
            self._snapshots = Snapshots(
                self._snapshot_settings,
                self.asker.inbox,
                site=self.site,
                shard=self.name,
                holder=self.instance,
                folder=self._folder,
            )
        try:
            opened = await reopen()
            if max(store.watermark for store in files_of(opened)) > state.last_sequence:
                logger.warning("%s ends before what this shard has applied; its stores start from empty", self._log)
                await opened.close()
                folders.clear(self._folder)
                opened = await reopen()
            if self._snapshots is not None:
                opened = await self._snapshots.start(opened, reopen, state)
        except sqlite3.DatabaseError as error:
            self.failed(error)
            raise
        if self._elsewhere is None:  # a device purges what it lets go of
            await check_for_hole(self.asker.inbox, self._log, opened, state)
        self._opened = Served(opened)
        self._lease = Lease(self.asker.inbox, subjects.LEASES.name, self._place, self.instance)
        self._rebuilds = Rebuilds(
            self._served,
            partial(open_beside, self._urls, origin),
            follow=self._followed,
            head=self._ask_head,
            lease=self._lease,
            folder=self._folder,
            inbox=self.asker.inbox,
            bucket=subjects.GENERATIONS.name,
            key=self._place,
            generations=generations,
        )

    @property
    def _place(self) -> str:
        """What the shard's keys in KV are under."""
        return f"{self.site}.{self.name}"

    async def ready(self) -> None:
        await self._reads.ready()

    @property
    def stores(self) -> Stores:
        """Its stores as they are read now, once it is prepared."""
        return self._served.stores

    @property
    def _served(self) -> Served:
        assert self._opened is not None, "it is prepared first"
        return self._opened

    async def release(self) -> None:
        if self._opened is not None:
            await self.stores.close()
        if self._lock is not None:
            self._lock.close()

    def failed(self, error: BaseException) -> None:
        """A file that cannot be read any more is not repaired: the next start begins from empty and reads the log."""
        if is_corrupt(error):
            folders.condemn(self._folder)
            raise Escalated(f"a store in {self._folder} is corrupt; the next start rebuilds it from the log") from error

    async def _follow(self) -> None:
        """Bring every event of our partitions to every projection, from where the slowest one stands."""
        after = min(projection.offered for projection in self.stores.embedded)
        async for batch in self._follower(after).batches(MOST_FOLLOWED):
            records = self._intake.records(batch)
            self._served.offered_to = batch[-1].sequence
            for projection in self.stores.embedded:
                await projection.offer(records, batch[-1].sequence)

    async def _followed(self, after: int) -> AsyncGenerator[tuple[list[Record], int], None]:
        """The log from there on for one store alone: batches of our partitions' records, each with its last place."""
        intake = self._intake.of_one_store()
        async with contextlib.aclosing(self._follower(after).batches(MOST_FOLLOWED)) as batches:
            async for batch in batches:
                yield intake.records(batch), batch[-1].sequence

    def _follower(self, after: int) -> Follower:
        """One that brings what one write says in one list, so that a store can commit it in one transaction."""
        return Follower(self.link, self.asker.inbox, self._log, after=after, incarnation=self._incarnation, whole=True)

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

    @handles(subjects.SHARD_STATUS)
    async def status(self, request: messages.Status, call: Call) -> messages.ShardStatus:
        """Counts are at least as new as the watermark. With a digest all of a store is told between two batches."""
        told: dict[Facet, Counted] = {}
        missing = []
        for facet in self.stores.facets:
            try:
                told[facet] = await facet.counted(digest=request.digest)
            except Unavailable:
                told[facet] = Counted(0, 0, facet.projection.watermark.value)
                missing.append(facet.projection.name)
        return messages.ShardStatus(
            shard=self.name,
            watermark={self.site: min(counted.at for counted in told.values())},
            partitions=len(self.partitions),
            entities=told[self.stores.documents].things,
            edges=told[self.stores.edges].edges,
            vectors=told[self.stores.vectors].things,
            skipped=self._intake.undecodable + self.stores.documents.rejected,
            quarantined=dict(self.stores.documents.quarantined),
            stores={facet.projection.name: counted.at for facet, counted in told.items()},
            missing=missing,
            rebuilds=self._rebuilds.states,
            digest="-".join(counted.digest for counted in told.values()) if request.digest else None,
            digests=[
                messages.StoreDigest(
                    part=part,
                    at=counted.at if digests.at is None else digests.at,
                    partitions=digests.by_partition(),
                )
                for counted in told.values()
                for part, digests in counted.digests.items()
            ],
        )

    @handles(subjects.SHARD_REBUILD)
    async def rebuild(self, request: messages.Rebuild, call: Call) -> messages.Rebuilding:
        state = await stream_state(self.asker.inbox, self._log)
        if await was_cut(self.asker.inbox, self._log, state):
            raise Conflict(f"the log begins at {state.first_sequence}: what was before cannot be had from it")
        self._rebuilds.ask(request.store)
        return messages.Rebuilding(store=request.store)

    @handles(subjects.TAKE_SNAPSHOT)
    async def take_snapshot(self, request: messages.TakeSnapshot, call: Call) -> messages.Snapshot:
        if self._snapshots is None:
            raise no_target()
        return (await self._snapshots.take(files_of(self.stores))).told()

    @handles(subjects.LIST_SNAPSHOTS)
    async def list_snapshots(self, request: messages.ListSnapshots, call: Call) -> messages.Snapshots:
        if self._snapshots is None:
            raise no_target()
        return await self._snapshots.told(files_of(self.stores), await stream_state(self.asker.inbox, self._log))

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
