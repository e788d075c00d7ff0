"""The reads of the store `neo4j:`, on the event loop. A walk is one query, however many hops it takes.

An entity whose edges have validities that begin or end is not known by its edges alone: its history is folded.

Neo4j shows a transaction while it commits piece by piece. So a read looks whether one did meanwhile, which is said
beside it (`:Commit`), and is done again with the shard's lock then, which whoever applies holds until all is there.
Looks at `neo4j_client`, `neo4j_store`, `neo4j_batch`, `memory_shards.merge` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import msgspec
import neo4j

from memory_shards.digests import Digests, fact_of_edge
from memory_shards.merge import State, edge_view, fold
from memory_shards.outside import OutsideProjection
from memory_shards.stores import Counted, Edge, Walk
from memory_shards.stores.neo4j_batch import decode_kept
from memory_shards.stores.neo4j_client import key_of
from memory_shards.stores.neo4j_store import Neo4jStore
from mnemesh.clock import wall_ms
from mnemesh.messages import Direction

MOST_APPLIED = 1_000
"""Records in one transaction."""

MOST_AHEAD = 1_000
"""Entities of one hop from which a walk goes on by itself."""

_WHOLE = """
OPTIONAL MATCH (b:Commit {key: $shard})
WITH coalesce(b.begun, '') AS begun, coalesce(b.ended, '') AS ended
CALL () { CALL () { _QUERY_ } RETURN collect(row) AS rows }
WITH begun, ended, rows
OPTIONAL MATCH (a:Commit {key: $shard})
RETURN begun = ended AND coalesce(a.begun, '') = begun AS whole, rows
"""
_LOCK = """
MATCH (s:Shard {key: $shard}) SET s.locked = true
WITH s MATCH (c:Commit {key: $shard}) SET c.ended = c.begun
"""
_EDGES_OF = """
MATCH (s:Shard {key: $shard})
OPTIONAL MATCH (e:Entity {key: $key})
RETURN [s.watermark, coalesce(e.exact_from, 0), [(e)-[r:EDGE]->(t) | [r.relation, t.id, r._properties]]] AS row
"""
_HISTORY = "MATCH (:Entity {key: $key})-[:SAID]->(v:Event) WITH v ORDER BY v.sequence RETURN v.kept AS row"
_INWARD = "MATCH (n:Entity)<-[r:EDGE|GONE]-(s:Entity) WHERE n.key IN $keys AND s.partition IN $partitions"
_OUTWARD = "MATCH (s:Entity)-[r:EDGE|GONE]->(o:Entity) WHERE s.key IN $keys"
_ONE_HOP = """
{inward_or_outward} {relations} AND type(r) = 'EDGE' AND coalesce(s.exact_from, 0) <= $now
WITH {near}.id AS near, r.relation AS relation, {far}.id AS far, s.key AS source
ORDER BY near, relation, far LIMIT $limit
RETURN [near, relation, far, source, false] AS row
UNION ALL
{inward_or_outward} {relations} AND s.exact_from > $now
RETURN [{near}.id, r.relation, {far}.id, s.key, true] AS row
"""
_WALK_BEGINS = """
MATCH (s:Entity) WHERE s.key IN $keys AND coalesce(s.exact_from, 0) <= $now
WITH collect(s) AS known, collect(s) AS front, [] AS walked, [] AS from
"""
_WALK_GOES_ON = """
CALL (front) {{
    UNWIND front AS s
    MATCH (s)-[r:EDGE]->(t:Entity) WHERE coalesce(s.exact_from, 0) <= $now {relations}
    WITH s, r, t LIMIT $limit
    RETURN collect([s.id, r.relation, t.id]) AS edges, collect(DISTINCT t) AS reached
}}
WITH known, walked + edges AS walked, from + [s IN front | s.id] AS from,
    [t IN reached WHERE t.partition IN $partitions AND coalesce(t.exact_from, 0) <= $now AND NOT t IN known] AS front
WITH known + front AS known, walked, from, CASE WHEN size(front) > $ahead THEN [] ELSE front END AS front
"""
_WALK_ENDS = "MATCH (m:Shard {key: $shard}) RETURN [walked, from, m.watermark] AS row"
_COUNT = "MATCH (s:Shard {key: $shard}) RETURN coalesce(s.edges, 0) AS edges, s.watermark AS at"
_DIGESTED = """
MATCH (e:Entity) WHERE e.site = $site AND e.partition IN $partitions AND e.ledger IS NOT NULL
RETURN e.tenant, e.id,
    [(e)-[r:EDGE|GONE]->(t) | [r.relation, t.id, type(r), r._valid_from, r._stamp, r._site, r._properties]] AS edges
"""


class Neo4jEdges:
    """Edges in Neo4j. Belongs to the event loop."""

    def __init__(self, store: Neo4jStore) -> None:
        self.projection = OutsideProjection("edges", store, most=MOST_APPLIED)
        self.store = store
        self._opened: neo4j.AsyncDriver | None = None

    @property
    def _driver(self) -> neo4j.AsyncDriver:
        """Made when it is used: by then the URL was found to be good."""
        if self._opened is None:
            self._opened = neo4j.AsyncGraphDatabase.driver(self.store.target.uri, **self.store.target.options)
        return self._opened

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
        await self.projection.close()

    async def edges_of(self, tenant: str, entity_id: str) -> tuple[list[Edge], int]:
        key = key_of(self.store.site, tenant, entity_id)
        found = await self._whole(_EDGES_OF, shard=self.store.shard_key, key=key)
        if not found:
            return [], 0
        ((latest, exact_from, edges),) = found
        if exact_from > wall_ms():
            state = await self._folded(key)
            return [
                edge_view(relation, target, edge.properties)
                for (relation, target), edge in sorted(state.edges.items())
                if not edge.removed
            ], await self._stands_at()
        return [
            edge_view(relation, target, raw and msgspec.json.decode(raw)) for relation, target, raw in sorted(edges)
        ], latest

    async def _folded(self, key: str) -> State:
        """What an entity's history comes to now."""
        history = [decode_kept(kept) for kept in await self._whole(_HISTORY, shard=self.store.shard_key, key=key)]
        return fold((kept.change() for kept in history), valid_at_ms=wall_ms())

    async def expand(
        self,
        tenant: str,
        entity_ids: Sequence[str],
        relations: Sequence[str],
        direction: Direction,
        limit: int,
        ahead: int = 0,
    ) -> Walk:
        keys = [key_of(self.store.site, tenant, entity_id) for entity_id in dict.fromkeys(entity_ids)]
        asked: dict[str, Any] = {
            "keys": keys,
            "relations": list(relations),
            "now": wall_ms(),
            "limit": limit + 1,
            "shard": self.store.shard_key,
            "partitions": self.store.partitions,
            "ahead": MOST_AHEAD,
        }
        if direction == "out" and ahead:
            walk = await self._walk_ahead(asked, set(entity_ids), bool(relations), ahead)
            if walk is not None:
                return walk
        ways = {"out": [True], "in": [False], "both": [True, False]}[direction]
        found: set[tuple[str, str, str]] = set()
        for outward in ways:
            rows = await self._whole(_one_hop(outward, bool(relations)), **asked)
            found.update(await self._holding(rows, outward=outward))
        edges = sorted(found)
        return Walk(edges[:limit], len(edges) > limit, [], await self._stands_at())

    async def _walk_ahead(
        self, asked: dict[str, Any], starts: set[str], with_relations: bool, ahead: int
    ) -> Walk | None:
        """All hops at once; `None` where that found too much, or began at what is not known by its edges alone."""
        ((walked, walked_from, latest),) = await self._whole(_walk(ahead, with_relations), **asked) or [([], [], 0)]
        if len(walked) >= asked["limit"] or not starts.issubset(walked_from):
            return None
        edges = [(near, relation, far) for near, relation, far in walked]
        return Walk(edges, False, [each for each in walked_from if each not in starts], latest or 0)

    async def _holding(self, rows: Iterable[Sequence[Any]], *, outward: bool) -> list[tuple[str, str, str]]:
        """Those edges that hold now, as they are walked."""
        states: dict[str, State] = {}
        held = []
        for near, relation, far, source, inexact in rows:
            if inexact:
                if source not in states:
                    states[source] = await self._folded(source)
                edge = states[source].edges.get((relation, far if outward else near))
                if edge is None or edge.removed:
                    continue
            held.append((near, relation, far))
        return held

    async def counted(self, *, digest: bool) -> Counted:
        ((edges, at),) = await self._ask(_COUNT, shard=self.store.shard_key) or [(0, 0)]
        return Counted(0, edges, at or 0, {"edges": await self._digests()} if digest else {})

    async def _digests(self) -> Digests:
        digests = Digests()
        asked = {"site": self.store.site, "partitions": self.store.partitions}
        async with self._driver.session(database=self.store.target.database) as session:
            async for tenant, entity_id, edges in await session.run(_DIGESTED, asked):
                for relation, target, kind, *key, raw in edges:
                    properties = msgspec.json.decode(raw) if raw else None
                    fact = fact_of_edge(relation, target, kind == "GONE", tuple(key), properties)
                    digests.add(tenant, entity_id, fact)
        return digests

    async def _stands_at(self) -> int:
        ((_, at),) = await self._ask(_COUNT, shard=self.store.shard_key) or [(0, 0)]
        return at or 0

    async def _whole(self, cypher: str, **asked: Any) -> list[Any]:
        """What a query calls `row`, of no moment at which only some of a batch was there."""
        ((is_whole, found),) = await self._ask(whole(cypher), **asked)
        if is_whole:
            return found  # type: ignore[no-any-return]

        async def locked(tx: neo4j.AsyncManagedTransaction) -> list[Any]:
            await (await tx.run(_LOCK, shard=asked["shard"])).consume()
            return [row async for (row,) in await tx.run(cypher, asked)]

        async def rows() -> list[Any]:
            async with self._driver.session(database=self.store.target.database) as session:
                return await session.execute_write(locked)

        return await self.projection.read(rows)

    async def _ask(self, cypher: str, **asked: Any) -> list[Any]:
        """The rows of a query."""

        async def rows() -> list[Any]:
            async with self._driver.session(database=self.store.target.database, default_access_mode="READ") as session:
                return await (await session.run(cypher, asked)).values()

        return await self.projection.read(rows)


def _with(cypher: str, relations: bool) -> str:
    return cypher.format(relations="AND r.relation IN $relations" if relations else "")


@cache
def _one_hop(outward: bool, relations: bool) -> str:
    """The query for the edges of some entities: those of sources that are exact, and all that others ever had."""
    return _ONE_HOP.format(
        inward_or_outward=_OUTWARD if outward else _INWARD,
        relations="AND r.relation IN $relations" if relations else "",
        near="s" if outward else "n",
        far="o" if outward else "s",
    )


@cache
def whole(cypher: str) -> str:
    """The query that tells what another calls `row`, and whether that is whole."""
    return _WHOLE.replace("_QUERY_", cypher)


def walk_query(hops_ahead: int, relations: bool) -> str:
    """The query that takes one hop and so many more, as it is asked."""
    return whole(_walk(hops_ahead, relations))


@cache
def _walk(hops_ahead: int, relations: bool) -> str:
    return _WALK_BEGINS + (1 + hops_ahead) * _with(_WALK_GOES_ON, relations) + _WALK_ENDS
