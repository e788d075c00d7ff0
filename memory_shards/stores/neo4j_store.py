"""The store `neo4j:`: the graph in Neo4j (`neo4j_client` says how it lies). A batch is one transaction.

    lock the shard's node → what the records name → merge (`memory_shards.merger`) → write, with the watermark
    → say that it commits → commit → say that it has

The lock makes whoever applies for the same shard wait, and see what was applied before. Several shards may share a
server: an edge leads to the same node, whosever entity that is. Where their transactions wait for each other in a
circle, Neo4j ends one, and it is tried again.

`apply` runs on the worker thread, over a driver that blocks: packing a batch would hold the event loop for long. Reads
are `neo4j_reader`'s. Looks at `memory_shards.merge` and `merger`, `neo4j_client` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

import msgspec
import neo4j

from memory_shards.merge import Edge
from memory_shards.merger import Kept, Merger, Name, Stored, Touched
from memory_shards.stores import WentBack, namespace, neo4j_client
from memory_shards.stores.neo4j_client import LAYOUT, Target, key_of
from mnemesh.event import Record
from mnemesh.ids import partition_of

EdgeKey: TypeAlias = tuple[Name, str, str]
"""((tenant, source id), relation, target id)."""

_LOCK = """
MERGE (s:Shard {key: $shard}) SET s.locked = true
RETURN s.watermark AS watermark, s.counts AS counts
"""
_MARK = """
MATCH (s:Shard {key: $shard})
SET s.watermark = $watermark, s.counts = $counts, s.edges = coalesce(s.edges, 0) + $edges
"""
_BEGUN = "MERGE (c:Commit {key: $shard}) SET c.begun = $commit"
_ENDED = "MATCH (c:Commit {key: $shard}) WHERE c.begun = $commit SET c.ended = $commit"
_STANDS = "MATCH (s:Shard {key: $shard, counts: $counts}) RETURN s.watermark AS watermark"
_LOAD = "UNWIND $keys AS key MATCH (e:Entity {key: key}) RETURN key, e.ledger AS ledger"
_HISTORY = "MATCH (:Entity {key: $key})-[:SAID]->(v:Event) RETURN v.kept AS kept ORDER BY v.sequence"
_THERE = """
UNWIND $wanted AS w
MATCH (:Entity {key: w.source})-[r:EDGE|GONE {relation: w.relation}]->(:Entity {key: w.target})
RETURN w.place AS place, type(r) = 'EDGE' AS holds, r._valid_from AS valid_from, r._stamp AS stamp, r._site AS site
"""
_ERASE = """
UNWIND $erased AS w MATCH (e:Entity {key: w.key})
CALL (e, w) {
    MATCH (e)-[:SAID]->(v:Event)
    WHERE w.all OR v.stamp < w.stamp OR (v.stamp = w.stamp AND v.site < w.site) DETACH DELETE v }
CALL (e) {
    MATCH (e)-[r:EDGE|GONE]->() WITH r, type(r) AS kind DELETE r
    RETURN sum(CASE kind WHEN 'EDGE' THEN 1 ELSE 0 END) AS edges }
RETURN sum(edges) AS edges
"""
_LED_TO = (
    "UNWIND $keys AS key MATCH (:Entity {key: key})-[:EDGE|GONE]->(t:Entity) RETURN collect(DISTINCT t.key) AS keys"
)
_PUT_ENTITIES = """
UNWIND $entities AS w
MERGE (e:Entity {key: w.key})
SET e.site = w.site, e.tenant = w.tenant, e.id = w.id, e.partition = w.partition, e.type = w.type,
    e.exact_from = w.exact_from, e.ledger = w.ledger
FOREACH (_ IN CASE WHEN w.alive THEN [1] ELSE [] END | REMOVE e:Forgotten)
FOREACH (_ IN CASE WHEN w.alive THEN [] ELSE [1] END | SET e:Forgotten)
"""
_PUT_TARGETS = """
UNWIND $targets AS w
MERGE (e:Entity {key: w.key})
ON CREATE SET e.site = w.site, e.tenant = w.tenant, e.id = w.id, e.partition = w.partition
ON MATCH SET e.id = w.id  // which locks it: else another shard may drop it before an edge leads to it
"""
_TAKE_EDGES = """
UNWIND $edges AS w
MATCH (:Entity {key: w.source})-[r:EDGE|GONE {relation: w.relation}]->(:Entity {key: w.target}) DELETE r
"""
_PUT_EDGES = """
UNWIND $edges AS w MATCH (s:Entity {key: w.source}) MATCH (t:Entity {key: w.target})
CREATE (s)-[r:EDGE]->(t) SET r = w.values
"""
_CHANGE_EDGES = """
UNWIND $edges AS w
MATCH (:Entity {key: w.source})-[r:EDGE {relation: w.relation}]->(:Entity {key: w.target}) SET r = w.values
"""
_PUT_GONE = _PUT_EDGES.replace(":EDGE", ":GONE")
_PUT_EVENTS = """
UNWIND $events AS w MATCH (e:Entity {key: w.key})
CREATE (e)-[:SAID]->(:Event {sequence: w.sequence, stamp: w.stamp, site: w.site, kept: w.kept})
"""
_DROP_LONELY = """
UNWIND $keys AS key MATCH (e:Entity {key: key}) WHERE e.ledger IS NULL AND NOT (e)--() DELETE e
"""
_CLEAR = """
MATCH (e:Entity) WHERE e.site = $site AND e.partition IN $partitions AND e.ledger IS NOT NULL
WITH e LIMIT $most
CALL (e) { MATCH (e)-[:SAID]->(v:Event) DETACH DELETE v }
CALL (e) { MATCH (e)-[r:EDGE|GONE]->() DELETE r }
REMOVE e.ledger, e.type, e.exact_from, e:Forgotten
RETURN count(e) AS cleared
"""
_CLEAR_TARGETS = """
MATCH (e:Entity) WHERE e.site = $site AND e.ledger IS NULL AND NOT (e)--() WITH e LIMIT $most DELETE e
RETURN count(e) AS cleared
"""
_BEGIN = """
MERGE (s:Shard {key: $shard}) WITH s WHERE coalesce(s.counts, '') <> $counts
SET s.counts = $counts, s.watermark = 0, s.edges = 0, s.site = $site, s.partitions = $partitions
"""
_END_OTHERS = """
MATCH (s:Shard {site: $site}) WHERE s.key <> $shard AND any(each IN s.partitions WHERE each IN $partitions)
SET s.counts = ''
"""

_DROP = "MATCH (s:Shard|Commit {key: $shard}) DELETE s"

_CLEARED_AT_ONCE = 2_000

WRITE_S = 5.0
"""How long a transaction may take: one whose replica hangs keeps the next from applying for so long."""

EDGE_S = 0.005
"""How much longer for each event, and each edge that it says: an atomic write of a thousand is one transaction, and
would never be done otherwise. Neo4j takes 0.2 to 0.5 ms for an edge on a small machine."""

Result = TypeVar("Result")

encode_stored = msgspec.msgpack.Encoder().encode
decode_stored = msgspec.msgpack.Decoder(Stored).decode
decode_kept = msgspec.msgpack.Decoder(Kept).decode
_to_json = msgspec.json.Encoder().encode


class Neo4jStore:
    """Writes the edges of some partitions of a site's log. What was written for another is cleared as it is opened."""

    outages = neo4j_client.OUTAGES
    is_shared = True

    def __init__(
        self, url: str, *, site: str, shard: str, partitions: Iterable[int], incarnation: str, generation: int = 0
    ) -> None:
        self.target = Target.of(url)
        self._born = site
        self.site = namespace(site, generation)
        self.partitions = sorted(partitions)
        self.shard_key = f"{self.site}.{shard}"
        self._counts = f"{LAYOUT} {incarnation} {self.partitions}"
        self._opened: neo4j.Driver | None = None
        self._watermark = 0
        self._commit: str | None = None
        """What the transaction that is under way is called, once it commits."""

    @property
    def watermark(self) -> int:
        """Where it stood when it was last asked, or applied."""
        return self._watermark

    def open(self) -> None:
        """Connect. Raises `BadRequest` on a server that is no good."""
        self._opened = neo4j_client.open_sync(self.target)

    def look(self) -> int | None:
        """Where the server stands now; `None` where what it has is of another log."""
        with self._session() as session:
            there = session.execute_read(lambda tx: tx.run(_STANDS, shard=self.shard_key, counts=self._counts).single())
        stands: int | None = None if there is None else there["watermark"]
        self._watermark = stands or 0
        return stands

    def begin(self, *, afresh: bool) -> None:
        """Clear what was written for another log, a piece at a time. Nodes that edges of others lead to stay."""
        with self._session() as session:
            self._write(session, self._end_others)
            if afresh:
                self._write(session, self._begin, "")
            for statement in (_CLEAR, _CLEAR_TARGETS):
                while self._write(session, self._clear, statement):
                    pass
            self._write(session, self._begin, self._counts)

    def drop(self) -> None:
        """Delete all that Neo4j has of it, a piece at a time."""
        with self._session() as session:
            self._write(session, self._begin, "")
            for statement in (_CLEAR, _CLEAR_TARGETS):
                while self._write(session, self._clear, statement):
                    pass
            self._write(session, lambda tx: tx.run(_DROP, self._asked).consume())

    def _end_others(self, tx: neo4j.ManagedTransaction) -> None:
        """Whoever had some of our partitions, and may again, has to begin anew."""
        tx.run(_END_OTHERS, self._asked).consume()

    def _begin(self, tx: neo4j.ManagedTransaction, counts: str) -> None:
        tx.run(_BEGIN, self._asked | {"counts": counts}).consume()

    @property
    def _asked(self) -> dict[str, Any]:
        return {"shard": self.shard_key, "site": self.site, "partitions": self.partitions}

    def _write(
        self, session: neo4j.Session, work: Callable[..., Result], *arguments: object, within_s: float = WRITE_S
    ) -> Result:
        """Do work in a transaction, which Neo4j ends when it takes longer, or waits so long for another."""
        return session.execute_write(neo4j.unit_of_work(timeout=within_s)(work), *arguments)

    def _session(self) -> neo4j.Session:
        assert self._opened is not None, "it is opened first"
        return self._opened.session(database=self.target.database)

    def apply(self, records: Sequence[Record], watermark: int, after: int = 0) -> None:
        """Commit the effects of `records`, in log order, and stand at `watermark`. On the worker thread only.

        Raises what the driver raises where Neo4j cannot be reached; nothing of the call has had an effect then, or all.
        Raises `WentBack` where the server stands before `after`.
        """
        within_s = WRITE_S + EDGE_S * sum(1 + _edges_in(record) for record in records)
        with self._session() as session:
            self._commit = None
            self._watermark = self._write(session, self._apply, records, watermark, after, within_s=within_s)
            if self._commit is not None:
                session.run(_ENDED, shard=self.shard_key, commit=self._commit).consume()

    def _apply(self, tx: neo4j.ManagedTransaction, records: Sequence[Record], watermark: int, after: int) -> int:
        """Where the store stands then. May run several times, until one commits."""
        there = tx.run(_LOCK, shard=self.shard_key).single(strict=True)
        stands: int = there["watermark"] if there["counts"] == self._counts else -1
        if stands < after:
            raise WentBack(f"it stands at {stands}, and stood at {after}")
        if watermark <= stands:
            return stands
        batch = _Batch(tx, self.site, self._born, [record for record in records if record.sequence > stands])
        told = {"shard": self.shard_key, "watermark": watermark, "counts": self._counts, "edges": batch.write()}
        tx.run(_MARK, told).consume()
        self._commit = uuid4().hex
        with self._session() as beside:
            beside.run(_BEGUN, shard=self.shard_key, commit=self._commit).consume()
        return watermark

    def _clear(self, tx: neo4j.ManagedTransaction, cypher: str) -> int:
        """How many nodes were cleared; none once somebody else has done so and writes there."""
        there = tx.run(_LOCK, shard=self.shard_key).single(strict=True)
        if there["counts"] == self._counts:
            return 0
        cleared: int = tx.run(cypher, self._asked | {"most": _CLEARED_AT_ONCE}).single(strict=True)["cleared"]
        return cleared

    def close(self) -> None:
        """Let go of the connections."""
        if self._opened is not None:
            self._opened.close()


class _Batch:
    """Records on their way into Neo4j, in a transaction that its maker owns."""

    def __init__(self, tx: neo4j.ManagedTransaction, site: str, born: str, records: Sequence[Record]) -> None:
        self._tx = tx
        self._site = site
        names = dict.fromkeys((record.event.tenant, record.event.entity_id) for record in records)
        self._keys = {name: key_of(site, *name) for name in names}
        self._merger = Merger(self._load(), site=born, put_aside={}, parts=frozenset(("edges",)))
        self._merger.take(records, self._history)

    def _load(self) -> dict[Name, Touched]:
        names = {key: name for name, key in self._keys.items()}
        loaded = {name: Touched() for name in self._keys}
        for key, ledger in self._tx.run(_LOAD, keys=list(names)).values():
            if ledger is not None:
                loaded[names[key]] = Touched.of(decode_stored(ledger))
        return loaded

    def _history(self, name: Name) -> list[Kept]:
        return [decode_kept(kept) for (kept,) in self._tx.run(_HISTORY, key=self._keys[name]).values()]

    def write(self) -> int:
        """Write what the records come to; returns by how many more edges hold."""
        dirty = self._merger.dirty
        if not dirty:
            return 0
        erased, lonely = self._erase()
        self._put_entities()
        gained = self._put_edges(
            {
                (name, relation, target): edge
                for name, entity in dirty.items()
                for (relation, target), edge in entity.state.edges.items()
            }
        )
        events = [
            {
                "key": self._keys[name],
                "sequence": kept.sequence,
                "stamp": kept.stamp,
                "site": kept.site,
                "kept": encode_stored(kept),
            }
            for name, entity in dirty.items()
            for kept in entity.added
            if kept.op == "put"
        ]
        if events:
            self._tx.run(_PUT_EVENTS, events=events).consume()
        if lonely:
            self._tx.run(_DROP_LONELY, keys=lonely).consume()
        return gained - erased

    def _erase(self) -> tuple[int, list[str]]:
        """Take out what forgets win over; returns how many edges went, and what they led to."""
        erased = []
        for name, entity in self._merger.dirty.items():
            if entity.cleared or entity.erases is not None:
                stamp, site = entity.erases or (0, "")
                erased.append({"key": self._keys[name], "all": entity.cleared, "stamp": stamp, "site": site})
        if not erased:
            return 0, []
        keys = [each["key"] for each in erased]
        led_to: list[str] = self._tx.run(_LED_TO, keys=keys).single(strict=True)["keys"]
        edges: int = self._tx.run(_ERASE, erased=erased).single(strict=True)["edges"]
        return edges, led_to

    def _put_entities(self) -> None:
        entities = []
        for (tenant, entity_id), entity in self._merger.dirty.items():
            state = entity.state
            entities.append(
                {
                    "key": self._keys[tenant, entity_id],
                    "site": self._site,
                    "tenant": tenant,
                    "id": entity_id,
                    "partition": entity.partition,
                    "type": state.type,
                    "alive": state.alive,
                    "exact_from": state.exact_from or None,
                    "ledger": encode_stored(entity.stored()),
                }
            )
        self._tx.run(_PUT_ENTITIES, entities=entities).consume()

    def _put_edges(self, edges: dict[EdgeKey, Edge]) -> int:
        """Put in those whose keys win; returns by how many more hold."""
        if not edges:
            return 0
        there = self._there(edges)
        winners = {each: edge for each, edge in edges.items() if each not in there or edge.key >= there[each][1]}
        held = {each for each in winners if each in there and there[each][0]}
        changed = [self._row(*each, winners[each]) for each in held if not winners[each].removed]
        if changed:
            self._tx.run(_CHANGE_EDGES, edges=changed).consume()
        fresh = {each: edge for each, edge in winners.items() if each not in held or edge.removed}
        replaced = [self._place(*each) for each in fresh if each in there]
        if replaced:
            self._tx.run(_TAKE_EDGES, edges=replaced).consume()
        targets = {(tenant, target): None for (tenant, _), _, target in fresh}
        self._tx.run(
            _PUT_TARGETS,
            targets=[
                {
                    "key": key_of(self._site, tenant, target),
                    "site": self._site,
                    "tenant": tenant,
                    "id": target,
                    "partition": partition_of(tenant, target),
                }
                for tenant, target in sorted(targets)
            ],
        ).consume()
        for statement, removed in ((_PUT_EDGES, False), (_PUT_GONE, True)):
            rows = [self._row(*each, edge) for each, edge in fresh.items() if edge.removed == removed]
            if rows and self._tx.run(statement, edges=rows).consume().counters.relationships_created < len(rows):
                raise WentBack("a node went that an edge was to lead to")
        return sum(not edge.removed for edge in winners.values()) - len(held)

    def _row(self, name: Name, relation: str, target: str, edge: Edge) -> dict[str, Any]:
        return self._place(name, relation, target) | {"values": _values(relation, edge)}

    def _there(self, edges: Iterable[EdgeKey]) -> dict[EdgeKey, tuple[bool, tuple[int, int, str]]]:
        """Those of these edges that are there: whether they hold, and their keys."""
        asked = list(edges)
        wanted = [self._place(*each) | {"place": place} for place, each in enumerate(asked)]
        return {
            asked[place]: (holds, tuple(key)) for place, holds, *key in self._tx.run(_THERE, wanted=wanted).values()
        }

    def _place(self, name: Name, relation: str, target: str) -> dict[str, Any]:
        return {"source": self._keys[name], "relation": relation, "target": key_of(self._site, name[0], target)}


def _edges_in(record: Record) -> int:
    """How many edges an event says, if it is one that says them well."""
    said = (record.event.body.get(part) for part in ("edges", "remove_edges"))
    return sum(len(edges) for edges in said if isinstance(edges, list))


def _values(relation: str, edge: Edge) -> dict[str, Any]:
    """The properties of a relationship."""
    valid_from, stamp, site = edge.key
    values = neo4j_client.simple(edge.properties) if not edge.removed else {}
    values |= {"relation": relation, "_valid_from": valid_from, "_stamp": stamp, "_site": site}
    if edge.properties and not edge.removed:
        values["_properties"] = _to_json(edge.properties).decode()
    return values
