"""One transaction's worth of records on their way into `memory.db`.

All entities that a batch touches are read at once, merged in Python, and written at once. Edges are not read at
all: the upsert compares keys. Only `forget` goes to the tables on its own, for it needs the history that it leaves.
Looks at `memory_shards.merge`, `sqlite_schema` and `bulk`; knows nothing of transactions and watermarks.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from memory_shards import merge
from memory_shards.merge import Change, State
from memory_shards.stores.bulk import execute_all, select_all
from memory_shards.stores.sqlite_schema import Doc, body_blob, history
from mnemesh import wire
from mnemesh.event import Record
from mnemesh.messages import HeldState

log = logging.getLogger(__name__)

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
_INSERT_EVENT = "INSERT OR FAIL INTO event VALUES {rows}"
_FORGET_EVENTS = "DELETE FROM event WHERE entity = ? AND (stamp, site) < (?, ?)"
_ERASURE = "INSERT OR REPLACE INTO erasure VALUES (?, ?)"
_SIZE = "SELECT ifnull(sum(length(body)), 0) FROM event WHERE entity = ?"
_FORGET_EDGES = "DELETE FROM edge WHERE source = ?"
_RELEASE = [f"DELETE FROM {table} = ?" for table in ("event WHERE entity", "edge WHERE source", "entity WHERE id")]
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

_ledger_decoder = msgspec.msgpack.Decoder(merge.Ledger)
_ledger_encoder = msgspec.msgpack.Encoder()


class _Touched:
    """An entity that the batch has touched. `state.edges` holds only what is not yet written."""

    __slots__ = ("held", "held_state", "id", "indexed_text", "partition", "size", "state", "version")

    def __init__(
        self,
        id: int,
        state: State,
        version: int = 0,
        partition: int = 0,
        size: int = 0,
        held: int | None = None,
        held_state: HeldState | None = None,
    ) -> None:
        self.id = id
        self.state = state
        self.indexed_text = state.text
        self.version = version
        self.partition = partition
        self.size = size
        self.held = held
        self.held_state = held_state


class Batch:
    """Takes records in log order; `write` writes them. Used once, in a transaction that its maker owns.

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
    ) -> None:
        self.rejected = 0
        self.quarantined: Counter[str] = Counter()
        self.erasing = erasing
        self._erased_more = False
        self._site = site
        self._put_aside = put_aside
        self._connection = connection
        self._records = records
        self._loaded: dict[tuple[str, str], _Touched] = {}
        self._dirty: dict[tuple[str, str], _Touched] = {}
        self._events: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        """Rows of what was taken and not yet written, by entity."""

    def write(self) -> None:
        """Merge all records and write what they come to."""
        self._load({(record.event.tenant, record.event.entity_id) for record in self._records})
        for record in self._records:
            self._take(record)
        self._flush(self._dirty)
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

    def _load(self, names: Iterable[tuple[str, str]]) -> None:
        missing = sorted(names)
        for row in select_all(self._connection, _LOAD, missing):
            tenant, entity_id, id, ledger, alive, type, text, doc, exact_from, *rest = row
            attributes, _ = wire.decode(doc)
            state = State(_ledger_decoder.decode(ledger), bool(alive), type, text, attributes, {}, exact_from)
            self._loaded[tenant, entity_id] = _Touched(id, state, *rest)
        last: int = self._connection.execute("SELECT ifnull(max(id), 0) FROM entity").fetchone()[0]
        for id, new in enumerate((name for name in missing if name not in self._loaded), last + 1):
            self._loaded[new] = _Touched(id, State())

    def _take(self, record: Record) -> None:
        """Merge one record. One that breaks a rule changes only the entity's version, and is counted."""
        event = record.event
        name = event.tenant, event.entity_id
        entity = self._dirty[name] = self._loaded[name]
        entity.partition = record.partition
        if event.op == "hold":
            entity.held = event.body.get("bytes", 0)
            entity.held_state = event.body.get("state", "whole")
            return
        if event.op == "release":
            self._release(name, entity)
            return
        entity.version = record.sequence
        if record.quarantined:
            told = record.sequence, event.tenant, event.entity_id, event.id, event.site, event.hlc
            self._connection.execute(_QUARANTINE, told)
            self.quarantined[event.site] += 1
            return
        if self._put_aside.get(event.site) or self.quarantined[event.site]:  # it may have been stamped anew
            self.quarantined[event.site] -= self._connection.execute(_RESTAMP, (event.site, event.id)).rowcount
        if not self._merge(name, entity, record):
            tombstone = entity.state.ledger.tombstone
            if event.op == "forget" or (tombstone is not None and (event.hlc, event.site) < tombstone):
                self._connection.execute(_ERASURE, (record.sequence, 0))

    def _merge(self, name: tuple[str, str], entity: _Touched, record: Record) -> bool:
        """Merge one event; whether it has an effect."""
        event = record.event
        try:
            patch = merge.patch_of(event)
            body = body_blob(event, patch)
        except (ValueError, OverflowError, RecursionError) as error:
            self.rejected += 1
            log.warning("event %d of the log is skipped: %s", record.sequence, error)
            return False
        if merge.is_repeated(record, entity.state.ledger.births, entity.state.ledger.stamps):
            return False
        change = merge.stamped(record, patch, entity.state.ledger.stamps)
        if entity.state.is_forgotten(change):
            return False
        if change.patch is None:
            self._forget(name, entity, change)
        else:
            entity.state.put(change)
        entity.size += len(body)
        self._events[entity.id].append(
            (
                record.sequence,
                entity.id,
                event.tenant,
                event.id,
                event.op,
                event.agent,
                event.site,
                change.stamp,
                record.recorded_at,
                change.valid_from,
                change.valid_to,
                body,
                change.hub,
                change.saw,
            )
        )
        return True

    def _release(self, name: tuple[str, str], entity: _Touched) -> None:
        """Hold it no more: all of it goes, but what this site wrote itself, and what that was merged with.

        That is noted: where the entity is forgotten, the device must hear of it.
        """
        if self._site in entity.state.ledger.stamps:
            entity.held, entity.held_state = 0, "some"
            return
        self._flush([name])
        if entity.indexed_text is not None:
            self._connection.execute(_UNINDEX_TEXT, (entity.id, entity.indexed_text))
            self._erased_more = True
        for statement in _RELEASE:
            self._connection.execute(statement, (entity.id,))
        self._loaded[name] = _Touched(entity.id, State())

    def _forget(self, name: tuple[str, str], entity: _Touched, change: Change) -> None:
        """Erase what the forget wins over, and bring up what is left."""
        self._flush([name])
        self._dirty[name] = entity
        self._erased_more |= entity.indexed_text is not None
        erased = self._connection.execute(_FORGET_EVENTS, (entity.id, *change.mark)).rowcount
        self._connection.execute(_ERASURE, (change.sequence, erased))
        self._connection.execute(_FORGET_EDGES, (entity.id,))
        entity.size = self._connection.execute(_SIZE, (entity.id,)).fetchone()[0]
        before, kind = entity.state.ledger, entity.state.type
        entity.state = merge.fold([*history(self._connection, entity.id), change])
        ledger = entity.state.ledger
        ledger.stamps, ledger.births, ledger.gone = before.stamps, before.births, kind or before.gone
        ledger.types |= before.types  # also where something is left: it was written under them

    def _flush(self, names: Iterable[tuple[str, str]]) -> None:
        """Write all that was taken of these entities and is not yet written."""
        entities: list[tuple[Any, ...]] = []
        events: list[tuple[Any, ...]] = []
        edges: list[tuple[Any, ...]] = []
        unindexed: list[tuple[int, str]] = []
        indexed: list[tuple[int, str]] = []
        for name in list(names):
            tenant, entity_id = name
            entity = self._dirty.pop(name)
            events += self._events.pop(entity.id, [])
            state = entity.state
            doc: Doc = state.attributes, state.spaces
            entities.append(
                (
                    entity.id,
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
            for (relation, target), edge in state.edges.items():
                properties = wire.encode(edge.properties) if edge.properties else None
                edges.append((entity.id, relation, target, tenant, edge.removed, *edge.key, properties))
            state.edges.clear()
            if state.text != entity.indexed_text:
                if entity.indexed_text is not None:
                    unindexed.append((entity.id, entity.indexed_text))
                if state.text is not None:
                    indexed.append((entity.id, state.text))
                entity.indexed_text = state.text
        execute_all(self._connection, _UPSERT_ENTITY, entities)
        execute_all(self._connection, _UPSERT_EDGE, edges)
        execute_all(self._connection, _INSERT_EVENT, sorted(events))
        self._connection.executemany(_UNINDEX_TEXT, unindexed)
        self._connection.executemany(_INDEX_TEXT, indexed)


def levels_in(structure: bytes) -> int:
    """How many levels an index of texts has: after a cookie of 4 bytes, as one of SQLite's varints."""
    levels = 0
    for byte in structure[4:]:
        levels = levels << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return levels
