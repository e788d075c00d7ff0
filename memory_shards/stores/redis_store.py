"""The store `redis:`: documents and their history in Redis, or in Redis Cluster (`redis_layout` says how they lie).

    watch what is applied → the entities that the records name → merge (`redis_batch`) → one transaction

Where the server is one, a batch is one transaction, with its watermark. A cluster takes one for each partition, which
lies in one slot with up to where it is applied; the watermark follows when all of them are there. So effects are once
in either, and whoever applies while another does fails: what both watch has changed.

`apply` runs on the worker thread, over a client of its own; the reads are `redis_reader`'s. Looks at `redis_batch`,
`redis_layout`, `redis_client` and `mnemesh`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memory_shards.stores import WentBack, namespace
from memory_shards.stores import redis_layout as layout
from memory_shards.stores.redis_batch import Batch, Commands, PutAside
from memory_shards.stores.redis_client import OUTAGES, AnyRedis, open_sync
from memory_shards.stores.redis_layout import Keys
from mnemesh.event import Record

logger = logging.getLogger("mnemesh.redis")

_CLEARED_AT_ONCE = 500
COUNTED_EVERY_S = 5.0
"""How often a replica that only reads counts what is put aside."""


class RedisStore:
    """Writes the documents of some partitions of a site's log. Several shards, also of other sites, may share a server.

    What was written for another incarnation of the log is cleared as it is opened. `shard` names whose watermark it is.
    """

    outages = OUTAGES
    is_shared = True

    def __init__(
        self, url: str, *, site: str, shard: str, partitions: Iterable[int], incarnation: str, generation: int = 0
    ) -> None:
        self.url = url
        named = namespace(site, generation)
        self.keys: Mapping[int, Keys] = {partition: Keys(named, partition) for partition in sorted(partitions)}
        self.in_cluster = False
        self._client: AnyRedis = None
        self._site = site
        self._shard = layout.shard_key(named, shard)
        self._counts = f"{layout.LAYOUT} {incarnation} {sorted(self.keys)}".encode()
        self._written_for = f"{layout.LAYOUT} {incarnation}".encode()
        self._watermark = 0
        self.rejected = 0
        self.quarantined: Counter[str] = Counter()
        """How many events of each site were put aside; where another replica applies, as it was seconds ago."""
        self._counted_at = float("-inf")
        self._places: dict[int, int] = {}
        """Where each partition in a cluster stood at least, as the shard's hash has it."""
        self._lost: dict[int, int] = {}
        """Where those stand that stood further."""

    @property
    def watermark(self) -> int:
        """Where it stood when it was last asked, or applied."""
        return self._watermark

    def open(self) -> None:
        """Connect. Raises `BadRequest` on a server that is no good."""
        self._client, self.in_cluster = open_sync(self.url)

    def look(self) -> int | None:
        """Where the server stands now; `None` where what it has is of another log."""
        stands = self._stands()
        self._watermark = stands or 0
        if time.monotonic() - self._counted_at > COUNTED_EVERY_S:
            self._counted_at = time.monotonic()
            self.quarantined.clear()
            for put_aside in self._each(lambda pipe, keys: pipe.hvals(keys.quarantine)):
                self.quarantined.update(layout.decode_quarantined(raw).site for raw in put_aside)
        return stands

    def _stands(self) -> int | None:
        """Where a node of a cluster lost some of a partition, no further than that has."""
        told = self._client.hgetall(self._shard)
        if told.get(b"counts") != self._counts:
            return None
        self.rejected = int(told.get(b"rejected", 0))
        if self.in_cluster:
            self._places = {each: int(told.get(b"%d" % each, 0)) for each in self.keys}
            has = self._each(lambda pipe, keys: pipe.hget(keys.meta, "applied"))
            applied = dict(zip(self.keys, (int(each or 0) for each in has), strict=True))
            self._lost = {each: place for each, place in applied.items() if place < self._places[each]}
        return min([int(told[b"watermark"]), *self._lost.values()])

    def begin(self, *, afresh: bool) -> None:
        """Clear the partitions that were written for another log, and count anew. Until then nobody reads them."""
        self._client.delete(self._shard)
        if afresh:
            for keys in self.keys.values():
                self._client.hset(keys.meta, "for", "nothing: it is being cleared")
        found = self._each(lambda pipe, keys: pipe.hget(keys.meta, "for"))
        for keys, written_for in zip(self.keys.values(), found, strict=True):
            if written_for != self._written_for:
                if written_for is not None:
                    logger.warning("%s was written for another log: cleared", keys.meta.decode())
                self._clear(keys)
        self._client.hset(self._shard, mapping={"watermark": 0, "counts": self._counts})
        self._counted_at = float("-inf")

    def drop(self) -> None:
        """Delete all that Redis has of it, partition by partition."""
        self.begin(afresh=True)
        self._client.delete(self._shard)
        for keys in self.keys.values():
            self._client.delete(keys.meta)

    def apply(self, records: Sequence[Record], watermark: int, after: int = 0) -> None:
        """Commit the effects of `records`, in log order, and stand at `watermark`. On the worker thread only.

        Raises `redis.RedisError` where Redis cannot be reached or another applies; whatever had an effect then has none
        when it is tried again. Raises `WentBack` where the server stands before `after`.
        """
        by_partition: dict[int, list[Record]] = defaultdict(list)
        for record in records:
            by_partition[record.partition].append(record)
        if self.in_cluster:
            stands = self._check(after)
            if self._lost:
                self._set_back(stands)
            rejected = sum(self._commit({partition: some}, None) for partition, some in by_partition.items())
            reached = {partition: some[-1].sequence for partition, some in by_partition.items()}
            self._mark(watermark, reached, rejected, after)
        else:
            self._commit(by_partition, (watermark, after))
        self._watermark = max(self._watermark, watermark)

    def _check(self, after: int) -> int:
        """Where the server stands. Raises `WentBack` where that is before `after`."""
        stands = self._stands()
        if stands is None or stands < after:
            raise WentBack(f"it stands at {stands}, and stood at {after}")
        return stands

    def _set_back(self, watermark: int) -> None:
        """Note where the shard and those partitions stand that lost some, before what they lost is applied again."""
        noted = {"watermark": watermark} | {str(each): place for each, place in self._lost.items()}
        with self._client.pipeline(transaction=True) as transaction:
            transaction.watch(self._shard)
            if transaction.hget(self._shard, "counts") == self._counts:
                transaction.multi()
                transaction.hset(self._shard, mapping=noted)
                transaction.execute()
        self._places |= self._lost

    def _mark(self, watermark: int, reached: Mapping[int, int], rejected: int, after: int) -> None:
        """Note where the shard and its partitions in a cluster stand, never less than is noted.

        Raises `WentBack` where another has set it back since, and applies again what was lost.
        """
        with self._client.pipeline(transaction=True) as transaction:
            transaction.watch(self._shard)
            noted = transaction.hgetall(self._shard)
            if int(noted.get(b"watermark", 0)) < after:
                raise WentBack(f"it was set back to {int(noted.get(b'watermark', 0))}, and stood at {after}")
            further = {
                name: value
                for name, value in (
                    {"watermark": watermark} | {str(each): place for each, place in reached.items()}
                ).items()
                if value > int(noted.get(name.encode(), 0))
            }
            transaction.multi()
            if noted.get(b"counts") == self._counts and further:
                transaction.hset(self._shard, mapping=further)
                transaction.hincrby(self._shard, "rejected", rejected)
            transaction.execute()

    def _commit(self, records: Mapping[int, Sequence[Record]], places: tuple[int, int] | None) -> int:
        """Apply what is not applied yet of some partitions, in one transaction. How many records broke a rule.

        With `places`, the server is to stand at the first of them, and stands at the second or later.
        """
        watched = [self.keys[partition].meta for partition in records]
        with self._client.pipeline(transaction=True) as transaction:
            transaction.watch(*watched, *([self._shard] if places else []))
            stands = self._check(places[1]) if places else 0
            fresh, put_aside = self._fresh(records)
            batch = Batch(self._client, self.keys, fresh, site=self._site, put_aside=put_aside)
            commands = batch.write()
            if places and places[0] > stands:
                commands.add(b"HSET", self._shard, b"watermark", places[0])
                commands.add(b"HINCRBY", self._shard, b"rejected", batch.rejected)
            elif not fresh:
                return 0
            transaction.multi()
            key = watched[0] if watched else self._shard
            commands.run(transaction, key)
            transaction.execute()
        self.rejected += batch.rejected
        self.quarantined.update(batch.quarantined)
        self._counted_at = time.monotonic()
        return batch.rejected

    def _fresh(self, records: Mapping[int, Sequence[Record]]) -> tuple[list[Record], PutAside]:
        """What is not applied yet, in log order; and what is put aside in the same partitions."""
        if not records:
            return [], {}
        reading = Commands()
        for partition in records:
            reading.add(b"HGET", self.keys[partition].meta, b"applied")
            reading.add(b"HLEN", self.keys[partition].quarantine)
        found = reading.run(self._client, self.keys[partition].meta)
        applied = dict(zip(records, (int(each or 0) for each in found[::2]), strict=True))
        for partition, place in applied.items():
            if place < self._places.get(partition, 0):
                raise WentBack(f"partition {partition} stands at {place}, and stood at {self._places[partition]}")
        put_aside: PutAside = defaultdict(list)
        for partition in (partition for partition, count in zip(records, found[1::2], strict=True) if count):
            for sequence, raw in self._client.hgetall(self.keys[partition].quarantine).items():
                told = layout.decode_quarantined(raw)
                put_aside[told.site, told.event_id].append((partition, sequence))
        fresh = [each for some in records.values() for each in some if each.sequence > applied[each.partition]]
        return sorted(fresh, key=lambda record: record.sequence), put_aside

    def close(self) -> None:
        """Let go of the connection."""
        if self._client is not None:
            self._client.close()

    def _each(self, ask: Any) -> list[Any]:
        """What a command says of each partition."""
        with self._client.pipeline(transaction=False) as reading:
            for keys in self.keys.values():
                ask(reading, keys)
            return reading.execute()  # type: ignore[no-any-return]

    def _clear(self, keys: Keys) -> None:
        """Delete all of a partition, unless somebody else has done so and writes there already."""
        for tenant in self._client.smembers(keys.tenants):
            names = keys.of(tenant.decode())
            for index in (names.ids, names.gone):
                while some := self._client.zrange(index, 0, _CLEARED_AT_ONCE - 1):
                    known = [entity_id.decode() for entity_id in some]
                    of_entities = [f(name) for f in (names.entity, names.ledger, names.events) for name in known]
                    if not self._delete(keys, of_entities, index, some):
                        return
            if not self._delete(keys, [names.ids, names.gone, names.log, names.valid]):
                return
        self._delete(keys, [keys.tenants, keys.erasures, keys.quarantine], anew=True)

    def _delete(
        self, keys: Keys, deleted: list[bytes], index: bytes = b"", names: Sequence[bytes] = (), *, anew: bool = False
    ) -> bool:
        """Delete keys of a partition while it is not yet ours; whether it was not. With `anew` it is, from then on."""
        with self._client.pipeline(transaction=True) as transaction:
            transaction.watch(keys.meta)
            if transaction.hget(keys.meta, "for") == self._written_for:
                return False
            transaction.multi()
            transaction.delete(*deleted)
            if names:
                transaction.zrem(index, *names)
            if anew:
                transaction.delete(keys.meta)
                transaction.hset(keys.meta, "for", self._written_for)
            transaction.execute()
        return True
