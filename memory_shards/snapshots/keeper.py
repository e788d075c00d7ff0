"""A shard's snapshots: when one is due, which replica takes it, which are kept.

    look     what does the newest manifest say?  →  due?  →  wait for the lease  →  still due?  →  take
    take     take  →  remove what is older than the newest `KEPT`  →  sweep what was left half-way

One replica at a time takes one, by a lease in KV, and an operator's wish goes the same way. Looks at the other files
here, at `lease`, `stores` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from memory_shards.snapshots import taking
from memory_shards.snapshots.manifest import Damaged, Manifest, age_s, manifests_of, pieces_of
from memory_shards.snapshots.settings import SnapshotSettings
from memory_shards.snapshots.starting import is_of_this_log, manifests, start, unfit
from memory_shards.snapshots.targets import open_target
from memory_shards.stores import Store
from memory_shards.stores.by_url import Stores
from memory_shards.stores.sqlite_schema import is_corrupt
from memory_shards.stores.urls import without_password
from mnemesh import messages, subjects
from mnemesh.errors import BadRequest, MnemeshError, Unavailable
from mnemesh.inbox import Inbox
from mnemesh.jetstream import StreamState
from mnemesh.lease import Lease
from mnemesh.stats import Gauge
from mnemesh.supervision import first_of

logger = logging.getLogger("mnemesh.snapshots")

KEPT = 2
LOOK_S = 60.0
"""How often each replica looks what there is, at least."""
LEFT_OVER_S = 3_600.0
"""Pieces without a manifest are swept when they are as old as this: nobody takes that long."""


class Snapshots:
    """The snapshots of one shard at the target of the settings. Raises `BadRequest` where that is no good."""

    def __init__(
        self, settings: SnapshotSettings, inbox: Inbox, *, site: str, shard: str, holder: str, folder: Path
    ) -> None:
        self.target = open_target(settings.url, inbox)
        self._told = without_password(settings.url)
        self._every_s = settings.every_s
        self._inbox = inbox
        self._site, self._shard, self._holder = site, shard, holder
        self._folder = folder / "to-snapshot"
        self._newest: Manifest | None = None
        self._taking = asyncio.Lock()

    async def start(self, stores: Stores, reopen: Callable[[], Awaitable[Stores]], state: StreamState) -> Stores:
        """The stores that a shard starts with (`starting.start`)."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)  # of one that was killed at it
        return await start(self.target, stores, reopen, site=self._site, shard=self._shard, state=state)

    # ── taking ──────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, files: Callable[[], Sequence[Store]]) -> None:
        """Take one of the `files` that there are whenever it is due, for ever. What keeps it from that is told, and
        tried again."""
        while True:
            wait_s = LOOK_S
            stores = files()
            try:
                self._newest = await self._newest_of(stores)
                if (wait_s := self._due_in_s(stores)) <= 0:
                    await self._in_turn(stores, self._take_if_due)
            except (MnemeshError, Damaged, sqlite3.Error, OSError) as error:
                if is_corrupt(error):
                    raise
                logger.warning("no snapshot of %s was taken: %s; trying again", self._shard, str(error)[:300])
                wait_s = LOOK_S
            await asyncio.sleep(min(max(wait_s, 0), LOOK_S))

    async def take(self, stores: Sequence[Store]) -> Manifest:
        """Take one now. Raises `Unavailable` where that fails, or a `MnemeshError` of the target.

        `sqlite3.DatabaseError` where a store's file is found to be corrupt: to copy it is to read all of it.
        """
        try:
            return await self._in_turn(stores, self._take)
        except (Damaged, sqlite3.Error, OSError) as error:
            if isinstance(error, MnemeshError) or is_corrupt(error):
                raise
            logger.warning("no snapshot of %s was taken: %s", self._shard, str(error)[:300])
            raise Unavailable(f"no snapshot was taken: {str(error)[:300]}") from error

    async def _in_turn(
        self, stores: Sequence[Store], work: Callable[[Sequence[Store]], Awaitable[Manifest]]
    ) -> Manifest:
        """Do it while no other replica does."""
        done: list[Manifest] = []
        lease = Lease(self._inbox, subjects.LEASES.name, f"{self._site}.{self._shard}.snapshots", self._holder)

        async def held() -> None:
            await lease.taken.wait()
            await first_of(lease.lost.wait(), working())

        async def working() -> None:
            done.append(await work(stores))

        async with self._taking:
            await first_of(lease.run(), held())
        if not done:
            raise Unavailable("the lease was lost before the snapshot was taken", retry_after_ms=1000)
        return done[0]

    async def _take_if_due(self, stores: Sequence[Store]) -> Manifest:
        self._newest = await self._newest_of(stores)
        if self._newest is not None and self._due_in_s(stores) > 0:
            return self._newest
        return await self._take(stores)

    async def _take(self, stores: Sequence[Store]) -> Manifest:
        taken = await taking.take(self.target, stores, site=self._site, shard=self._shard, folder=self._folder)
        self._newest = taken
        logger.info(
            "snapshot %s of %s has the log up to %d: %d bytes in %.1f s",
            taken.id,
            self._shard,
            taken.watermark,
            taken.stored,
            taken.seconds,
        )
        await self._clear_away(stores)
        return taken

    async def _newest_of(self, stores: Sequence[Store]) -> Manifest | None:
        """The newest that these stores could start from."""
        found, _ = await manifests(self.target, self._site, self._shard)
        return next((manifest for manifest in found if unfit(manifest, stores) is None), None)

    def _due_in_s(self, stores: Sequence[Store]) -> float:
        """Seconds until the next one; where nothing was applied since the last, as many as there are between two."""
        if self._newest is None:
            return 0.0 if any(store.watermark for store in stores) else LOOK_S
        if not any(store.watermark > _watermark_in(self._newest, store) for store in stores):
            return self._every_s
        return min(self._every_s, self._every_s - self._age_s())

    # ── keeping ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _clear_away(self, stores: Sequence[Store]) -> None:
        """Remove all of this log but the newest that fit, manifest first: what has none does not exist.

        Then what was left half-way. Another mesh may have the same target, so what is of another log stays.
        """
        found, damaged = await manifests(self.target, self._site, self._shard)
        kept = [manifest.id for manifest in found if unfit(manifest, stores) is None][:KEPT]
        gone: set[str] = set()
        if len(kept) == KEPT:
            ours = {manifest.id for manifest in found if is_of_this_log(manifest, stores)}
            gone = (ours | damaged.keys()) - set(kept)
            prefix = manifests_of(self._site, self._shard)
            await self.target.remove([f"{prefix}{id}" for id in sorted(gone)])
        existing = {manifest.id for manifest in found} | damaged.keys()
        pieces = pieces_of(self._site, self._shard)
        orphans = []
        for name in await self.target.names(pieces):
            id = name.removeprefix(pieces).partition("/")[0]
            if id in gone or (id not in existing and age_s(id) >= LEFT_OVER_S):
                orphans.append(name)
        await self.target.remove(orphans)

    # ── telling ─────────────────────────────────────────────────────────────────────────────────────────────

    async def told(self, stores: Sequence[Store], state: StreamState) -> messages.Snapshots:
        """What there is. Raises a `MnemeshError` of the target."""
        found, damaged = await manifests(self.target, self._site, self._shard)
        told = [manifest.told(unfit(manifest, stores, state.last_sequence)) for manifest in found]
        return messages.Snapshots(target=self._told, snapshots=told, damaged=damaged)

    def gauges(self) -> list[Gauge]:
        """Nothing until there is one."""
        newest = self._newest
        if newest is None:
            return []
        return [
            Gauge("snapshot_age_s", "Seconds since the newest verified snapshot was taken", self._age_s),
            Gauge("snapshot_bytes", "Bytes of the newest verified snapshot at its target", lambda: newest.stored),
            Gauge("snapshot_seconds", "Seconds that the newest verified snapshot took", lambda: newest.seconds),
        ]

    def _age_s(self) -> float:
        assert self._newest is not None, "there is one"
        return (datetime.now(UTC) - self._newest.taken_at).total_seconds()


def no_target() -> BadRequest:
    return BadRequest("this shard takes no snapshots: start it with --snapshots URL, such as nats: or file:///backups")


def _watermark_in(manifest: Manifest, store: Store) -> int:
    file = manifest.file(store.file.name)
    return 0 if file is None else file.watermark
