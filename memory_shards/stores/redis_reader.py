"""The reads of the store `redis:`, on the event loop. Each is one round trip where it can be.

A partition's keys are in one slot, so a read of one entity asks one node; what spans entities asks every partition at
once and merges. Looks at `redis_layout`, `redis_client`, `memory_shards.merge` and `suspects`, and at `mnemesh`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from memory_shards.digests import Digests, facts_of_document
from memory_shards.merge import Change, Document, fold
from memory_shards.merger import Kept, Stored
from memory_shards.outside import OutsideProjection
from memory_shards.stores import Counted
from memory_shards.stores import redis_layout as layout
from memory_shards.stores.redis_client import AnyRedis, open_async
from memory_shards.stores.redis_layout import Keys, Tenant
from memory_shards.stores.redis_store import RedisStore
from memory_shards.suspects import suspects
from mnemesh import wire
from mnemesh.clock import from_ms, wall_ms
from mnemesh.ids import partition_of
from mnemesh.messages import Description, Left, ListedEntity, Suspect, TimelineEvent

MOST_APPLIED = 500
"""Records in one transaction: about 5 ms in which the server serves nobody else."""

_NAMES_A_PAGE = 500


class RedisDocuments:
    """Documents in Redis. Belongs to the event loop."""

    def __init__(self, store: RedisStore) -> None:
        self.projection = OutsideProjection("documents", store, most=MOST_APPLIED)
        self.store = store
        self._opened: AnyRedis = None
        self._keys = store.keys

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.aclose()
        await self.projection.close()

    @property
    def _client(self) -> AnyRedis:
        """Made once the store was opened, which tells whether there is a cluster."""
        if self._opened is None:
            self._opened = open_async(self.store.url, is_cluster=self.store.in_cluster)
        return self._opened

    @property
    def quarantined(self) -> Mapping[str, int]:
        return self.store.quarantined

    @property
    def rejected(self) -> int:
        return self.store.rejected

    async def held(self) -> tuple[int, int]:
        return 0, 0  # a device keeps what it holds in itself

    async def get(
        self, tenant: str, entity_id: str, as_of_ms: int | None = None, valid_at_ms: int | None = None
    ) -> Document | None:
        now = wall_ms()
        if as_of_ms is None and valid_at_ms is None:
            key = self._of(tenant, entity_id).entity(entity_id)
            fields = await self.projection.read(lambda: self._client.hgetall(key))
            if not fields:
                return None
            if int(fields.get(layout.EXACT_FROM, 0)) <= now:
                return Document(
                    entity_id=entity_id,
                    type=layout.text_in(fields.get(layout.TYPE)),
                    attributes=layout.attributes_in(fields),
                    edges=None,
                    spaces=layout.names_in(fields.get(layout.SPACES)),
                    text=layout.text_in(fields.get(layout.TEXT)),
                    version=int(fields[layout.VERSION]),
                )
        keys = self._of(tenant, entity_id)
        entries, raw = await self._ask(
            lambda pipe: (pipe.zrange(keys.events(entity_id), 0, -1), pipe.get(keys.ledger(entity_id)))
        )
        changes = [kept.change() for kept in _kept_in(entries)]
        version = layout.decode_stored(raw).version if raw else 0
        if as_of_ms is not None:
            changes = [change for change in changes if change.recorded_at <= as_of_ms]
            version = max((change.sequence for change in changes), default=0)
        state = fold(changes, valid_at_ms=now if valid_at_ms is None else valid_at_ms)
        return state.document(entity_id, version)

    async def suspects(self, tenant: str, entity_id: str) -> list[Suspect]:
        return suspects(await self._changes(tenant, entity_id))

    async def _changes(self, tenant: str, entity_id: str) -> list[Change]:
        key = self._of(tenant, entity_id).events(entity_id)
        entries = await self.projection.read(lambda: self._client.zrange(key, 0, -1))
        return [kept.change() for kept in _kept_in(entries)]

    async def timeline(self, tenant: str, entity_id: str, after: int, limit: int) -> list[TimelineEvent]:
        key = self._of(tenant, entity_id).events(entity_id)
        entries = await self.projection.read(
            lambda: self._client.zrange(key, f"({after}", "+inf", byscore=True, offset=0, num=limit)
        )
        return [_event(entity_id, kept) for kept in _kept_in(entries)]

    async def timeline_range(
        self, tenant: str, start_ms: int | None, end_ms: int | None, type: str | None, after: int, limit: int
    ) -> list[TimelineEvent]:
        bounded = start_ms is not None or end_ms is not None
        chosen: list[tuple[int, str]] = []
        while len(chosen) < limit:
            if bounded:
                some = await self._in_time(tenant, start_ms, end_ms, after)
            else:
                some = await self._in_log(tenant, after, limit)
            fitting = some if type is None else await self._of_type(tenant, some, type)
            chosen += fitting[: limit - len(chosen)]
            if bounded or len(some) < limit:
                break
            after = some[-1][0]
        found = await self._ask(
            lambda pipe: [
                pipe.zrange(self._of(tenant, name).events(name), sequence, sequence, byscore=True)
                for sequence, name in chosen
            ]
        )
        return [
            _event(name, kept) for (_, name), entries in zip(chosen, found, strict=True) for kept in _kept_in(entries)
        ]

    async def _in_log(self, tenant: str, after: int, limit: int) -> list[tuple[int, str]]:
        """The next events by sequence, at least `limit` of them if there are: (sequence, entity)."""
        found = await self._each(
            lambda pipe, keys: pipe.zrange(keys.of(tenant).log, f"({after}", "+inf", byscore=True, offset=0, num=limit)
        )
        return list(islice(heapq.merge(*(map(_placed, some) for some in found)), limit))

    async def _in_time(
        self, tenant: str, start_ms: int | None, end_ms: int | None, after: int
    ) -> list[tuple[int, str]]:
        first = "-inf" if start_ms is None else start_ms
        last = "+inf" if end_ms is None else f"({end_ms}"
        found = await self._each(lambda pipe, keys: pipe.zrange(keys.of(tenant).valid, first, last, byscore=True))
        return sorted(placed for some in found for placed in map(_placed, some) if placed[0] > after)

    async def _of_type(self, tenant: str, placed: Sequence[tuple[int, str]], type: str) -> list[tuple[int, str]]:
        names = list(dict.fromkeys(name for _, name in placed))
        of_type = {name for name, stored in (await self._stored(tenant, names)).items() if stored.type == type}
        return [each for each in placed if each[1] in of_type]

    async def _stored(self, tenant: str, entity_ids: Sequence[str]) -> dict[str, Stored]:
        """What is kept of those of these entities that were ever written."""
        found = await self._ask(lambda pipe: [pipe.get(self._of(tenant, name).ledger(name)) for name in entity_ids])
        return {name: layout.decode_stored(raw) for name, raw in zip(entity_ids, found, strict=True) if raw}

    async def _first(self, tenant: str, entity_ids: Sequence[str]) -> list[int]:
        """The sequence of each entity's first event that is left; 0 where none is."""
        found = await self._ask(
            lambda pipe: [pipe.zrange(self._of(tenant, name).events(name), 0, 0) for name in entity_ids]
        )
        return [layout.decode_kept(entries[0]).sequence if entries else 0 for entries in found]

    async def list_entities(
        self, tenant: str, after: str, limit: int, *, types: Sequence[str] = (), held: bool, with_sites: bool
    ) -> list[ListedEntity]:
        if held:
            return []
        listed: list[ListedEntity] = []
        wanted = set(types)
        while len(listed) < limit:
            names = await self._names(tenant, after, max(limit, _NAMES_A_PAGE if types else 0))
            stored = await self._stored(tenant, names)
            fitting = [name for name in names if name in stored and (not wanted or stored[name].type in wanted)]
            fitting = fitting[: limit - len(listed)]
            for name, first in zip(fitting, await self._first(tenant, fitting), strict=True):
                each = stored[name]
                sites = each.ledger.sites if with_sites else []
                listed.append(
                    ListedEntity(
                        name, each.type, each.version, each.size, sites, first, None, sorted(each.ledger.types)
                    )
                )
            if len(names) < limit:
                break
            after = names[-1]
        return listed

    async def _names(self, tenant: str, after: str, limit: int) -> list[str]:
        """The ids that come next in the order of their bytes."""
        first = b"(" + after.encode() if after else b"-"
        found = await self._each(
            lambda pipe, keys: pipe.zrange(keys.of(tenant).ids, first, b"+", bylex=True, offset=0, num=limit)
        )
        return [name.decode() for name in islice(heapq.merge(*found), limit)]

    async def describe(self, tenant: str, entity_ids: Sequence[str]) -> list[Description]:
        stored = await self._stored(tenant, entity_ids)
        known = list(stored)
        firsts = dict(zip(known, await self._first(tenant, known), strict=True))
        described = []
        for name in entity_ids:
            each = stored.get(name)
            if each is None:
                described.append(Description())
                continue
            ledger = each.ledger
            is_gone = not each.alive and ledger.tombstone is not None
            kind = ledger.gone if is_gone else each.type
            described.append(Description(kind, ledger.sites, is_gone, firsts[name], sorted(ledger.types)))
        return described

    async def erased(
        self, tenant: str, entity_id: str, sequences: Sequence[int]
    ) -> tuple[list[int], list[int], list[Left]]:
        partition = self._keys[partition_of(tenant, entity_id)]
        counted, entries, put_aside = await self._ask(
            lambda pipe: (
                pipe.hmget(partition.erasures, list(sequences)),
                pipe.zrange(partition.of(tenant).events(entity_id), 0, -1),
                pipe.hvals(partition.quarantine),
            )
        )
        here = [(kept.site, kept.sequence) for kept in _kept_in(entries)]
        for told in map(layout.decode_quarantined, put_aside):
            if (told.tenant, told.entity_id) == (tenant, entity_id):
                here.append((told.site, told.sequence))
        events = Counter(site for site, _ in here)
        left = [Left(site, min(place for of, place in here if of == site), events[site]) for site in sorted(events)]
        places = {sequence for _, sequence in here}
        return [int(count or 0) for count in counted], [each for each in sequences if each in places], left

    async def forgotten(self, sequences: Sequence[int]) -> list[int]:
        if not sequences:
            return []
        found = await self._each(lambda pipe, keys: pipe.hmget(keys.erasures, list(sequences)))
        return sorted(
            {each for counted in found for each, count in zip(sequences, counted, strict=True) if count is not None}
        )

    async def counted(self, *, digest: bool) -> Counted:
        at = self.projection.stands_at
        tenants = await self._tenants()
        counts = await self._ask(lambda pipe: [pipe.zcard(keys.ids) for _, _, keys in tenants])
        return Counted(sum(counts), 0, at, {"attributes": await self._digests(tenants)} if digest else {})

    async def _tenants(self) -> list[tuple[str, Keys, Tenant]]:
        """Every tenant in every partition."""
        found = await self._each(lambda pipe, keys: pipe.smembers(keys.tenants))
        return sorted(
            (
                (raw.decode(), keys, keys.of(raw.decode()))
                for keys, tenants in zip(self._keys.values(), found, strict=True)
                for raw in tenants
            ),
            key=lambda each: (each[0], each[1].meta),
        )

    async def _digests(self, tenants: Iterable[tuple[str, Keys, Tenant]]) -> Digests:
        """Of all that is remembered and was forgotten."""
        digests = Digests()
        for tenant, _, keys in tenants:
            indices = await self._ask(partial(_add_indices, keys))
            names = [name.decode() for name in heapq.merge(*indices)]
            for start in range(0, len(names), _NAMES_A_PAGE):
                some = names[start : start + _NAMES_A_PAGE]
                stored = await self._stored(tenant, some)
                events = await self._ask(partial(_add_events, keys, some))
                hashes = await self._ask(partial(_add_hashes, keys, some))
                for name, entries, fields in zip(some, events, hashes, strict=True):
                    if not stored[name].alive and stored[name].ledger.tombstone is None:
                        continue  # only ever named by events that were skipped
                    digests.add(tenant, name, _facts(stored[name], fields, list(_kept_in(entries))))
        return digests

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, tenant: str, entity_id: str) -> Tenant:
        return self._keys[partition_of(tenant, entity_id)].of(tenant)

    async def _ask(self, ask: Callable[[Any], object]) -> list[Any]:
        """What the commands that `ask` adds to a pipeline say."""

        async def asked() -> list[Any]:
            async with self._client.pipeline(transaction=False) as pipe:
                ask(pipe)
                return await pipe.execute()  # type: ignore[no-any-return]

        return await self.projection.read(asked)

    async def _each(self, ask: Callable[[Any, Keys], object]) -> list[Any]:
        """What a command says of each partition."""
        return await self._ask(lambda pipe: [ask(pipe, keys) for keys in self._keys.values()])


def _add_indices(keys: Tenant, pipe: Any) -> None:
    pipe.zrange(keys.ids, 0, -1)
    pipe.zrange(keys.gone, 0, -1)


def _add_events(keys: Tenant, names: Iterable[str], pipe: Any) -> None:
    for name in names:
        pipe.zrange(keys.events(name), 0, -1)


def _add_hashes(keys: Tenant, names: Iterable[str], pipe: Any) -> None:
    for name in names:
        pipe.hgetall(keys.entity(name))


def _kept_in(entries: Iterable[bytes]) -> Iterable[Kept]:
    return map(layout.decode_kept, entries)


def _placed(member: bytes) -> tuple[int, str]:
    sequence, _, entity_id = member.partition(b" ")
    return int(sequence), entity_id.decode()


def _event(entity_id: str, kept: Kept) -> TimelineEvent:
    return TimelineEvent(
        sequence=kept.sequence,
        event_id=kept.event_id,
        entity_id=entity_id,
        op=kept.op,
        agent=kept.agent,
        recorded_at=from_ms(kept.recorded_at),
        valid_from=from_ms(kept.valid_from),
        valid_to=None if kept.valid_to is None else from_ms(kept.valid_to),
        body=wire.decode(kept.body),
    )


def _facts(stored: Stored, fields: dict[bytes, bytes], history: list[Kept]) -> object:
    """What is told of an entity: by its hash, if that is what readers are shown, or by its history.

    They are shown that where some of it has yet to begin or end; and where all has ended the hash has, too. A hash that
    is missing for another reason is told as empty, which it is to readers.
    """
    events = [(kept.stamp, kept.site, kept.event_id) for kept in history]
    now = wall_ms()
    if stored.exact_from > now or (not fields and (not stored.alive or stored.ends <= now)):
        state = fold(kept.change() for kept in history)
        return facts_of_document(
            stored.alive, stored.type, state.text, state.attributes, state.spaces, stored.ledger, events
        )
    return facts_of_document(
        stored.alive,
        layout.text_in(fields.get(layout.TYPE)),
        layout.text_in(fields.get(layout.TEXT)),
        layout.attributes_in(fields),
        layout.names_in(fields.get(layout.SPACES)),
        stored.ledger,
        events,
    )
