"""The shard: one replica of some partitions. It follows its site's log and answers reads from its stores.

Every replica of a shard reads the same log and listens in the same queue group; none is the leader. Its life:

    prepare   which log is it, open the stores (they empty themselves if they were built for another), start those that
              have nothing from a snapshot
    follow    messages of the log → records of our partitions → every projection
    serve     what is asked of it (`reads`)
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

from memory_shards import folder as folders
from memory_shards.demand import NoPolicy, ReadPolicy
from memory_shards.elsewhere import Elsewhere
from memory_shards.freshness import Freshness, LogHead
from memory_shards.intake import Intake
from memory_shards.origins import Origins
from memory_shards.outside import OutsideProjection
from memory_shards.reads import Reads
from memory_shards.rebuild import Rebuilds, generations_in
from memory_shards.served import Served
from memory_shards.shard_gauges import gauges_of
from memory_shards.snapshots.keeper import Snapshots, no_target
from memory_shards.snapshots.settings import NONE, SnapshotSettings
from memory_shards.snapshots.starting import check_for_hole, was_cut
from memory_shards.stores import Counted, Facet
from memory_shards.stores.by_url import Origin, Stores, files_of, open_beside, open_stores
from memory_shards.stores.sqlite_schema import is_corrupt
from memory_shards.stores.urls import EMBEDDED, StoreUrls
from mnemesh import messages, subjects
from mnemesh.actor import handles
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.errors import Conflict, Unavailable
from mnemesh.event import Record
from mnemesh.follower import Follower
from mnemesh.guard import Guard
from mnemesh.jetstream import last_of_each, stream_state
from mnemesh.lease import HELD, Lease
from mnemesh.stats import Gauge
from mnemesh.supervision import Escalated

logger = logging.getLogger("mnemesh.shard")

MOST_FOLLOWED = 1000


class Shard(Reads):
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
        return [] if self._opened is None else gauges_of(self.stores, self._intake, self._snapshots)

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
        self._opened = Served(opened)
        if self._elsewhere is None:  # a device purges what it lets go of
            await check_for_hole(self.asker.inbox, self._log, opened, state)
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
            async with self._served.handing:
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

    # ── what operators ask ──────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.SHARD_STATUS)
    async def status(self, request: messages.Status, call: Call) -> messages.ShardStatus:
        """Counts are at least as new as the watermark. With a digest all of a store is told between two batches."""
        told: dict[Facet, Counted] = {}
        missing = []
        stores = self.stores  # another may take the place of one meanwhile
        for facet in stores.facets:
            try:
                told[facet] = await facet.counted(digest=request.digest)
            except Unavailable:
                told[facet] = Counted(0, 0, facet.projection.watermark.value)
                missing.append(facet.projection.name)
        return messages.ShardStatus(
            shard=self.name,
            watermark={self.site: min(counted.at for counted in told.values())},
            partitions=len(self.partitions),
            entities=told[stores.documents].things,
            edges=told[stores.edges].edges,
            vectors=told[stores.vectors].things,
            skipped=self._intake.undecodable + stores.documents.rejected,
            quarantined=dict(stores.documents.quarantined),
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
        if not request.force and await was_cut(self.asker.inbox, self._log, state):
            raise Conflict(f"the log begins at {state.first_sequence}: what was before cannot be had from it")
        may_lack = state.first_sequence > 1 and not request.force
        return messages.Rebuilding(id=self._rebuilds.ask(self.stores.keeping(request.store), may_lack=may_lack))

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
