"""One transaction's worth of records on their way into `memory.db`.

All entities that a batch touches are read at once, merged in Python (`memory_shards.merger`), and written at once.
Edges are not read at all: the upsert compares keys. Looks at `memory_shards.merge` and `merger`, `sqlite_schema` and
`bulk`; knows nothing of transactions and watermarks.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple

from memory_shards.merge import Ledger, State
from memory_shards.merger import Kept, Merger, Name, Part, Touched
from memory_shards.stores.bulk import execute_all, select_all
from memory_shards.stores.sqlite_schema import Doc, kept_events
from mnemesh import wire
from mnemesh.event import Record

_LOAD = """
WITH wanted (tenant, entity_id) AS (VALUES {rows})
SELECT tenant, entity_id, id, ledger, alive, type, text, doc, exact_from, version, partition, size, held, held_state
FROM wanted CROSS JOIN entity USING (tenant, entity_id)
"""
_UPSERT_ENTITY = """
INSERT OR FAIL INTO entity
    (id, tenant, entity_id, partition, version, alive, exact_from, type, text, doc, ledger, size, held, held_state)
VALUES {rows}
ON CONFLICT (id) DO UPDATE SET partition = excluded.partition, version = excluded.version, alive = excluded.alive,
    exact_from = excluded.exact_from, type = excluded.type, text = excluded.text, doc = excluded.doc,
    ledger = excluded.ledger, size = excluded.size, held = excluded.held, held_state = excluded.held_state
"""
_UPSERT_EDGE = """
INSERT OR FAIL INTO edge (source, relation, target, tenant, removed, valid_from, stamp, site, properties)
VALUES {rows}
ON CONFLICT DO UPDATE SET removed = excluded.removed, valid_from = excluded.valid_from,
    stamp = excluded.stamp, site = excluded.site, properties = excluded.properties
WHERE (excluded.valid_from, excluded.stamp, excluded.site) >= (edge.valid_from, edge.stamp, edge.site)
"""
_INSERT_EVENT = f"INSERT OR FAIL INTO event ({', '.join(Kept.__struct_fields__)}, entity, tenant) VALUES {{rows}}"
_FORGET_EVENTS = "DELETE FROM event WHERE entity = ? AND (stamp, site) < (?, ?)"
_ERASURE = "INSERT OR REPLACE INTO erasure VALUES (?, ?)"
_CLEAR_EVENTS = "DELETE FROM event WHERE entity = ?"
_CLEAR_EDGES = "DELETE FROM edge WHERE source = ?"
_CLEAR_ENTITY = "DELETE FROM entity WHERE id = ?"
_QUARANTINE = "INSERT INTO quarantine VALUES (?, ?, ?, ?, ?, ?)"
_RESTAMP = "DELETE FROM quarantine WHERE site = ? AND event_id = ?"
_UNINDEX_TEXT = "INSERT INTO entity_text (entity_text, rowid, text) VALUES ('delete', ?, ?)"
_INDEX_TEXT = "INSERT INTO entity_text (rowid, text) VALUES (?, ?)"
_MERGE_INDEX = "INSERT INTO entity_text (entity_text, rank) VALUES ('merge', ?)"
_INDEX_STRUCTURE = "SELECT block FROM entity_text_data WHERE id = 10"  # FTS5's own, as its file format has it
_EMPTY_INDEX = "INSERT INTO entity_text (entity_text) VALUES ('delete-all')"
_FILL_INDEX = "INSERT INTO entity_text (rowid, text) SELECT id, text FROM entity WHERE text IS NOT NULL"

PAGES_MERGED = 100
"""Pages of the index of texts that are rewritten in one transaction for the sake of erased words, at 0.2 ms a page."""

MOST_LEVELS = 1_000
"""Levels of the index of texts from which on it is built anew, at about 15 µs a text. Every merge adds two that stay,
and an index of more than 2,000 SQLite 3.40 calls corrupt."""

_ledger_decoder = msgspec.msgpack.Decoder(Ledger)
_ledger_encoder = msgspec.msgpack.Encoder()


class Batch:
    """Merges records and writes what they come to. Used once, in a transaction that its maker owns.

    `site` is where the log is. Words of texts that are gone are in the index until `erasing` more merges have ended.
    `put_aside` is how many events of each site are quarantined; `quarantined` is by how much that changes.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        records: Sequence[Record],
        *,
        site: str,
        erasing: int,
        put_aside: Mapping[str, int],
        parts: frozenset[Part],
    ) -> None:
        self.quarantined: Counter[str] = Counter()
        self.erasing = erasing
        self._erased_more = False
        self._connection = connection
        self._records = records
        self._parts = parts
        self._ids: dict[Name, int] = {}
        loaded = self._load({(record.event.tenant, record.event.entity_id) for record in records})
        self._merger = Merger(loaded, site=site, put_aside=put_aside, parts=parts)

    @property
    def rejected(self) -> int:
        """How many of the records break a rule."""
        return self._merger.rejected

    def write(self) -> None:
        """Merge all records and write what they come to."""
        self._merger.take(self._records, self._history)
        self._write_entities()
        self._connection.executemany(_ERASURE, self._merger.erasures)
        self._write_quarantine()
        if self._erased_more or self.erasing:
            self._erase_words()

    def _erase_words(self) -> None:
        """Go on to merge all parts of the index into one, which takes several batches or steps where it is large.

        A word that is taken out of the index stays in the file until then: SQLite before 3.42 cannot do better. What is
        taken out meanwhile takes another merge.
        """
        self._connection.execute("SAVEPOINT written")  # FTS5 writes out what it has in memory, which no merge would see
        self._connection.execute("RELEASE written")
        is_due = self._erased_more
        if self.erasing and not self._merges(PAGES_MERGED):  # that one has ended
            is_due |= self.erasing > 1
            self.erasing = 0
        if is_due and self.erasing:
            self.erasing = 2
        elif is_due:
            self._begin_merge()

    def _begin_merge(self) -> None:
        if levels_in(self._connection.execute(_INDEX_STRUCTURE).fetchone()[0]) > MOST_LEVELS:
            self._connection.execute(_EMPTY_INDEX)
            self._connection.execute(_FILL_INDEX)
            return
        self.erasing = int(self._merges(-PAGES_MERGED))

    def _merges(self, pages: int) -> bool:
        """Have the index rewrite so many pages; negative: begin to merge all. Returns whether there was any to do."""
        before = self._connection.total_changes
        self._connection.execute(_MERGE_INDEX, (pages,))
        return self._connection.total_changes - before > 1  # the statement itself counts as one

    def _load(self, names: Iterable[Name]) -> dict[Name, Touched]:
        loaded: dict[Name, Touched] = {}
        missing = sorted(names)
        for row in select_all(self._connection, _LOAD, missing):
            tenant, entity_id, id, ledger, alive, type, text, doc, exact_from, version, partition, size, *held = row
            attributes, _ = wire.decode(doc)
            state = State(_ledger_decoder.decode(ledger), bool(alive), type, text, attributes, {}, exact_from)
            loaded[tenant, entity_id] = Touched(
                state, version=version, partition=partition, size=size, held=held[0], held_state=held[1]
            )
            self._ids[tenant, entity_id] = id
        last: int = self._connection.execute("SELECT ifnull(max(id), 0) FROM entity").fetchone()[0]
        for id, new in enumerate((name for name in missing if name not in loaded), last + 1):
            loaded[new] = Touched()
            self._ids[new] = id
        return loaded

    def _history(self, name: Name) -> list[Kept]:
        return kept_events(self._connection, self._ids[name])

    def _write_entities(self) -> None:
        entities: list[tuple[Any, ...]] = []
        events: list[tuple[Any, ...]] = []
        edges: list[tuple[Any, ...]] = []
        unindexed: list[tuple[int, str]] = []
        indexed: list[tuple[int, str]] = []
        released: list[tuple[int]] = []
        for (tenant, entity_id), entity in self._merger.dirty.items():
            id = self._ids[tenant, entity_id]
            state = entity.state
            if entity.cleared or entity.erases is not None:
                self._erase(id, entity)
            if entity.is_gone:
                released.append((id,))
                if entity.text_before is not None and "text" in self._parts:
                    unindexed.append((id, entity.text_before))
                continue
            doc: Doc = state.attributes, state.spaces
            entities.append(
                (
                    id,
                    tenant,
                    entity_id,
                    entity.partition,
                    entity.version,
                    state.alive,
                    state.exact_from,
                    state.type,
                    state.text,
                    wire.encode(doc),
                    _ledger_encoder.encode(state.ledger),
                    entity.size,
                    entity.held,
                    entity.held_state,
                )
            )
            for kept in entity.added:
                events.append((*astuple(kept), id, tenant))
            for (relation, target), edge in state.edges.items() if "edges" in self._parts else ():
                properties = wire.encode(edge.properties) if edge.properties else None
                edges.append((id, relation, target, tenant, edge.removed, *edge.key, properties))
            if state.text != entity.text_before and "text" in self._parts:
                if entity.text_before is not None:
                    unindexed.append((id, entity.text_before))
                if state.text is not None:
                    indexed.append((id, state.text))
        self._connection.executemany(_CLEAR_ENTITY, released)
        execute_all(self._connection, _UPSERT_ENTITY, entities)
        execute_all(self._connection, _UPSERT_EDGE, edges)
        execute_all(self._connection, _INSERT_EVENT, sorted(events))
        self._connection.executemany(_UNINDEX_TEXT, unindexed)
        self._connection.executemany(_INDEX_TEXT, indexed)

    def _erase(self, id: int, entity: Touched) -> None:
        self._erased_more |= entity.text_before is not None
        if entity.cleared:
            self._connection.execute(_CLEAR_EVENTS, (id,))
        elif entity.erases is not None:
            self._connection.execute(_FORGET_EVENTS, (id, *entity.erases))
        self._connection.execute(_CLEAR_EDGES, (id,))

    def _write_quarantine(self) -> None:
        for again in self._merger.restamped:
            self.quarantined[again[0]] -= self._connection.execute(_RESTAMP, again).rowcount
        self._connection.executemany(_QUARANTINE, self._merger.quarantined.values())
        self.quarantined.update(self._merger.uncounted)


def levels_in(structure: bytes) -> int:
    """How many levels an index of texts has: after a cookie of 4 bytes, as one of SQLite's varints."""
    levels = 0
    for byte in structure[4:]:
        levels = levels << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return levels
