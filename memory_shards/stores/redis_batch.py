"""A batch of records on its way into Redis: what they come to, and the commands that write it, which one script runs.

Looks at `memory_shards.merge` and `merger`, `redis_layout` and `redis_client`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgpack

from memory_shards.merge import NEVER, State
from memory_shards.merger import Kept, Merger, Name, Part, Stored, Touched
from memory_shards.stores import redis_layout as layout
from memory_shards.stores.redis_client import AnyRedis
from memory_shards.stores.redis_layout import Keys, Tenant
from mnemesh.event import Record

_PARTS: frozenset[Part] = frozenset(("attributes", "text"))

PutAside: TypeAlias = dict[tuple[str, str], list[tuple[int, bytes]]]
"""Events that are put aside, by site and event id: the partition, and the field of its `quarantine`."""


class Batch:
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
            commands.cut()
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

    They go to it as a text of MessagePack, or a few where there is much: 0.05 µs an argument, where arguments of its
    own would take 0.4. A whole number is one of Lua's there, which is exact up to 2⁵³; bytes are taken as they are.
    """

    SCRIPT = """
local replies = {}
for _, text in ipairs(ARGV) do
    local at, command = 0
    while at >= 0 do
        at, command = cmsgpack.unpack_one(text, at)
        replies[#replies + 1] = redis.call(unpack(command))
    end
end
return replies
"""
    MOST_ARGUMENTS = 4_000
    """Lua's stack takes twice as many. An even number, as many commands take pairs."""

    LONG_BYTES = 16 << 20
    """A server takes 512 MiB an argument, where nobody set less."""

    def __init__(self) -> None:
        self._packer = msgpack.Packer(use_bin_type=False, autoreset=False)  # Redis reads the older kind, without `bin`
        self._pack = self._packer.pack
        self._texts: list[bytes] = []

    def add(self, name: bytes, key: bytes, *arguments: Any) -> None:
        """One command on a key."""
        self._pack((name, key, *arguments))

    def add_all(self, begin: tuple[bytes, ...], arguments: Sequence[Any]) -> None:
        """A command that begins so, in several parts where there are many arguments; none where there are none."""
        for start in range(0, len(arguments), self.MOST_ARGUMENTS):
            self._pack((*begin, *arguments[start : start + self.MOST_ARGUMENTS]))

    def cut(self) -> None:
        """Begin another text where this one is long."""
        if len(self._packer.getbuffer()) > self.LONG_BYTES:
            self._texts.append(self._packer.bytes())
            self._packer.reset()

    def run(self, client: AnyRedis, key: bytes) -> Any:
        """What each says, or in a transaction that it will; `key` is one of theirs. At least one was added."""
        return client.execute_command("EVAL", self.SCRIPT, 1, key, *self._texts, *filter(None, [self._packer.bytes()]))


def _member(sequence: int, entity_id: str) -> bytes:
    """An event in the indices by sequence and by time."""
    return b"%d %s" % (sequence, entity_id.encode())
