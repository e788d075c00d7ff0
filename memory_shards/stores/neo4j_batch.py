"""A batch of records on its way into Neo4j: what they come to, and the statements that write it.

Looks at `memory_shards.merge` and `merger`, `neo4j_client` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import msgspec
import neo4j

from memory_shards.merge import Edge
from memory_shards.merger import Kept, Merger, Name, Stored, Touched
from memory_shards.stores import WentBack, neo4j_client
from memory_shards.stores.neo4j_client import key_of
from mnemesh.event import Record
from mnemesh.ids import partition_of

EdgeKey: TypeAlias = tuple[Name, str, str]
"""((tenant, source id), relation, target id)."""

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

encode_stored = msgspec.msgpack.Encoder().encode
decode_stored = msgspec.msgpack.Decoder(Stored).decode
decode_kept = msgspec.msgpack.Decoder(Kept).decode
_to_json = msgspec.json.Encoder().encode


class Batch:
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


def _values(relation: str, edge: Edge) -> dict[str, Any]:
    """The properties of a relationship."""
    valid_from, stamp, site = edge.key
    values = neo4j_client.simple(edge.properties) if not edge.removed else {}
    values |= {"relation": relation, "_valid_from": valid_from, "_stamp": stamp, "_site": site}
    if edge.properties and not edge.removed:
        values["_properties"] = _to_json(edge.properties).decode()
    return values
