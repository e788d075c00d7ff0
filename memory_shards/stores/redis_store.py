"""The store `redis:`: documents and their history in Redis, or in Redis Cluster (`redis_layout` says how they lie).

    watch what is applied → the entities that the records name → merge (`memory_shards.merger`) → one transaction

Where the server is one, a batch is one transaction, with its watermark. A cluster takes one for each partition, which
lies in one slot with up to where it is applied; the watermark follows when all of them are there. So effects are once
in either, and whoever applies while another does fails: what both watch has changed.

`apply` runs on the worker thread, over a client of its own; the reads are `redis_reader`'s. Looks at
`memory_shards.merge` and `merger`, `redis_layout`, `redis_client` and `mnemesh`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgpack

from memory_shards.merge import NEVER, State
from memory_shards.merger import Kept, Merger, Name, Part, Stored, Touched
from memory_shards.stores import WentBack, namespace
from memory_shards.stores import redis_layout as layout
from memory_shards.stores.redis_client import OUTAGES, AnyRedis, open_sync
from memory_shards.stores.redis_layout import Keys, Tenant
from mnemesh.event import Record

logger = logging.getLogger("mnemesh.redis")

_PARTS: frozenset[Part] = frozenset(("attributes", "text"))
_CLEARED_AT_ONCE = 500
COUNTED_EVERY_S = 5.0
"""How often a replica that only reads counts what is put aside."""

PutAside: TypeAlias = dict[tuple[str, str], list[tuple[int, bytes]]]
"""Events that are put aside, by site and event id: the partition, and the field of its `quarantine`."""


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
            batch = _Batch(self._client, self.keys, fresh, site=self._site, put_aside=put_aside)
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


class _Batch:
    """Records on their way into Redis: what they name is read when it is made, `write` says what to do."""

    def __init__(
        self,
        client: AnyRedis,
        keys: Mapping[int, Keys],
        records: Sequence[Record],
        *,
        site: str,
        put_aside: PutAside,
    ) -> None:
        self.quarantined: Counter[str] = Counter()
        self._client = client
        self._keys = keys
        self._records = records
        self._tenants: dict[Name, Tenant] = {}
        for record in records:
            event = record.event
            self._tenants[event.tenant, event.entity_id] = keys[record.partition].of(event.tenant)
        self._put_aside = put_aside
        self._known: dict[Name, Stored] = {}
        self._stamped: dict[Name, tuple[dict[str, Any], Any]] = {}
        self._read: dict[Name, list[Kept]] = {}
        self._ledgers: list[bytes] = []
        """What merging needs of each entity, after its key."""
        self._scores: dict[bytes, list[bytes]] = defaultdict(list)
        """What to add to the indices: each member after its score."""
        self._removed: dict[bytes, list[bytes]] = defaultdict(list)
        self._named: dict[bytes, set[str]] = defaultdict(set)
        """The tenants of each partition that may be new there."""
        sites = Counter(event_site for event_site, _ in put_aside)
        self._merger = Merger(self._load(), site=site, put_aside=sites, parts=_PARTS)
        self._merger.take(records, self._history)

    @property
    def rejected(self) -> int:
        """How many of the records break a rule."""
        return self._merger.rejected

    def _load(self) -> dict[Name, Touched]:
        keys = [keys.ledger(entity_id) for (_, entity_id), keys in self._tenants.items()]
        found = self._client.mget(keys) if keys else []  # in a cluster they are all of one partition, so of one slot
        loaded = {}
        for name, raw in zip(self._tenants, found, strict=True):
            if raw is None:
                loaded[name] = Touched()
                continue
            stored = self._known[name] = layout.decode_stored(raw)
            self._stamped[name] = dict(stored.ledger.attributes), stored.ledger.text
            loaded[name] = Touched.of(stored)
        return loaded

    def _history(self, name: Name) -> list[Kept]:
        if name not in self._read:
            entries = self._client.zrange(self._tenants[name].events(name[1]), 0, -1)
            self._read[name] = [layout.decode_kept(each) for each in entries]
        return self._read[name]

    def write(self) -> Commands:
        """The commands that write what the records come to, and up to where each partition is applied."""
        commands = Commands()
        for name, entity in self._merger.dirty.items():
            self._write_entity(commands, name, entity)
        commands.add_all((b"MSET",), self._ledgers)
        self._write_indices(commands)
        partition_of = {record.sequence: record.partition for record in self._records}
        for sequence, events in self._merger.erasures:
            commands.add(b"HSET", self._keys[partition_of[sequence]].erasures, sequence, events)
        for again in self._merger.restamped:
            for partition, field in self._put_aside.pop(again, []):
                commands.add(b"HDEL", self._keys[partition].quarantine, field)
                self.quarantined[again[0]] -= 1
        for sequence, told in self._merger.quarantined.items():
            commands.add(b"HSET", self._keys[partition_of[sequence]].quarantine, sequence, layout.encode(told))
        self.quarantined.update(self._merger.uncounted)
        last = {record.partition: record.sequence for record in self._records}
        for partition, sequence in last.items():
            commands.add(b"HSET", self._keys[partition].meta, b"applied", sequence)
        return commands

    def _write_entity(self, commands: Commands, name: Name, entity: Touched) -> None:
        keys, (_, entity_id), state = self._tenants[name], name, entity.state
        hash_key, events = keys.entity(entity_id), keys.events(entity_id)
        if entity.erases is not None:
            self._rewrite_history(commands, name, entity)
        for kept in entity.added:
            place, member = b"%d" % kept.sequence, _member(kept.sequence, entity_id)
            commands.add(b"ZADD", events, place, layout.encode(kept))
            self._scores[keys.log] += (place, member)
            self._scores[keys.valid] += (b"%d" % kept.valid_from, member)
        if not state.alive or entity.erases is not None:
            commands.add(b"DEL", hash_key)
        if state.alive:
            fields = layout.fields_of(state, entity.version)
            commands.add_all((b"HSET", hash_key), fields)
            if name in self._stamped and entity.erases is None:
                there = set(fields[::2])
                commands.add_all((b"HDEL", hash_key), [each for each in self._gone(name, state) if each not in there])
            if state.exact_from == NEVER and entity.ends < NEVER:  # all of it ends, and Redis drops it then
                commands.add(b"PEXPIREAT", hash_key, entity.ends)
            elif state.exact_from == NEVER:
                commands.add(b"PERSIST", hash_key)
        self._ledgers += (keys.ledger(entity_id), layout.encode(entity.stored()))
        self._index(name, state)

    def _gone(self, name: Name, state: State) -> Iterator[bytes]:
        """The fields that the records took away, and some that they wrote."""
        before, text = self._stamped[name]
        for attribute, key in state.ledger.attributes.items():
            if before.get(attribute) != key:
                yield layout.field(attribute)
        if state.ledger.text != text:
            yield layout.TEXT
        if not state.spaces:
            yield layout.SPACES

    def _rewrite_history(self, commands: Commands, name: Name, entity: Touched) -> None:
        """Put what a forget has left in place of what there was."""
        keys, (_, entity_id) = self._tenants[name], name
        left = entity.history or []
        commands.add(b"DEL", keys.events(entity_id))
        for kept in left:
            commands.add(b"ZADD", keys.events(entity_id), kept.sequence, layout.encode(kept))
        members = [_member(kept.sequence, entity_id) for kept in set(self._history(name)).difference(left)]
        commands.add_all((b"ZREM", keys.log), members)
        commands.add_all((b"ZREM", keys.valid), members)

    def _index(self, name: Name, state: State) -> None:
        """Have the entity among those that are remembered, or among the others."""
        keys, (tenant, entity_id), known = self._tenants[name], name, self._known.get(name)
        if known is None:
            self._named[keys.tenants].add(tenant)
        if known is None or known.alive != state.alive:
            here, there = (keys.ids, keys.gone) if state.alive else (keys.gone, keys.ids)
            self._scores[here] += (b"0", entity_id.encode())
            if known is not None:
                self._removed[there].append(entity_id.encode())

    def _write_indices(self, commands: Commands) -> None:
        """Many members a command."""
        for key, members in self._removed.items():
            commands.add_all((b"ZREM", key), members)
        for key, members_with_scores in self._scores.items():
            commands.add_all((b"ZADD", key), members_with_scores)
        for key, names in self._named.items():
            commands.add_all((b"SADD", key), list(names))


class Commands:
    """Commands that one script runs: each that a client sends costs it some 10 µs, each of a script the server 2.

    They go to it as one text, of MessagePack: 0.05 µs an argument, where arguments of its own would take 0.4. A whole
    number is one of Lua's there, which is exact up to 2⁵³; bytes are taken as they are.
    """

    SCRIPT = """
local replies, at, command = {}, 0
while at >= 0 do
    at, command = cmsgpack.unpack_one(ARGV[1], at)
    replies[#replies + 1] = redis.call(unpack(command))
end
return replies
"""
    MOST_ARGUMENTS = 4_000
    """Lua's stack takes twice as many. An even number, as many commands take pairs."""

    def __init__(self) -> None:
        self._packer = msgpack.Packer(use_bin_type=False, autoreset=False)  # Redis reads the older kind, without `bin`
        self._pack = self._packer.pack

    def add(self, name: bytes, key: bytes, *arguments: Any) -> None:
        """One command on a key."""
        self._pack((name, key, *arguments))

    def add_all(self, begin: tuple[bytes, ...], arguments: Sequence[Any]) -> None:
        """A command that begins so, in several parts where there are many arguments; none where there are none."""
        for start in range(0, len(arguments), self.MOST_ARGUMENTS):
            self._pack((*begin, *arguments[start : start + self.MOST_ARGUMENTS]))

    def run(self, client: AnyRedis, key: bytes) -> Any:
        """What each says, or in a transaction that it will; `key` is one of theirs. At least one was added."""
        return client.execute_command("EVAL", self.SCRIPT, 1, key, self._packer.bytes())


def _member(sequence: int, entity_id: str) -> bytes:
    """An event in the indices by sequence and by time."""
    return b"%d %s" % (sequence, entity_id.encode())
