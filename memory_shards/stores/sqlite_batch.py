"""One transaction's worth of records on their way into `memory.db`.

Each entity that a batch touches is read once, merged in Python, and written once. Edges are not read at all:
the upsert compares keys. Only `forget` goes to the tables at once, for it needs the history that it leaves.
Looks at `memory_shards.merge` and `sqlite_schema`; knows nothing of transactions and watermarks.
"""

from __future__ import annotations

import logging
import sqlite3
from typing import Any

import msgspec

from memory_shards import merge
from memory_shards.merge import Change, State
from memory_shards.stores.sqlite_schema import Doc, body_blob, history
from mnemesh import wire
from mnemesh.event import Record

log = logging.getLogger(__name__)

_LOAD = """
SELECT id, ledger, alive, type, text, doc, exact_from FROM entity WHERE tenant = ? AND entity_id = ?
"""
_INSERT_ENTITY = """
INSERT INTO entity (partition, version, alive, exact_from, type, text, doc, ledger, id, tenant, entity_id)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_UPDATE_ENTITY = """
UPDATE entity
SET partition = ?, version = ?, alive = ?, exact_from = ?, type = ?, text = ?, doc = ?, ledger = ? WHERE id = ?
"""
_UPSERT_EDGE = """
INSERT INTO edge (source, relation, target, tenant, removed, valid_from, stamp, site, properties)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET removed = excluded.removed, valid_from = excluded.valid_from,
    stamp = excluded.stamp, site = excluded.site, properties = excluded.properties
WHERE (excluded.valid_from, excluded.stamp, excluded.site) >= (edge.valid_from, edge.stamp, edge.site)
"""
_INSERT_EVENT = "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_FORGET_EVENTS = "DELETE FROM event WHERE entity = ? AND (stamp, site) < (?, ?)"
_FORGET_EDGES = "DELETE FROM edge WHERE source = ?"
_UNINDEX_TEXT = "INSERT INTO entity_text (entity_text, rowid, text) VALUES ('delete', ?, ?)"
_INDEX_TEXT = "INSERT INTO entity_text (rowid, text) VALUES (?, ?)"

_ledger_decoder = msgspec.msgpack.Decoder(merge.Ledger)
_ledger_encoder = msgspec.msgpack.Encoder()


class _Touched:
    """An entity that the batch has touched. `state.edges` holds only what is not yet written."""

    __slots__ = ("id", "indexed_text", "partition", "state", "stored", "version")

    def __init__(self, id: int, state: State, *, stored: bool) -> None:
        self.id = id
        self.state = state
        self.stored = stored
        self.indexed_text = state.text
        self.version = self.partition = 0


class Batch:
    """Takes records in log order; `flush` writes them. Used once, in a transaction that its maker owns."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.rejected = 0
        self._connection = connection
        self._last_id: int = connection.execute("SELECT ifnull(max(id), 0) FROM entity").fetchone()[0]
        self._loaded: dict[tuple[str, str], _Touched] = {}
        self._dirty: dict[tuple[str, str], _Touched] = {}
        self._events: list[tuple[Any, ...]] = []

    def take(self, record: Record) -> None:
        """Merge one record. One that breaks a rule changes only the entity's version, and is counted."""
        event = record.event
        name = event.tenant, event.entity_id
        entity = self._loaded.get(name)
        if entity is None:
            entity = self._loaded[name] = self._load(name)
        self._dirty[name] = entity
        entity.version = record.sequence
        entity.partition = record.partition
        try:
            patch = merge.patch_of(event)
            body = body_blob(event, patch)
        except (ValueError, OverflowError, RecursionError) as error:
            self.rejected += 1
            log.warning("event %d of the log is skipped: %s", record.sequence, error)
            return
        change = merge.stamped(record, patch, entity.state.ledger.stamps)
        if entity.state.is_forgotten(change):
            return
        if change.patch is None:
            self._forget(entity, change)
            self._dirty[name] = entity
        else:
            entity.state.put(change)
        self._events.append(
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
            )
        )

    def _load(self, name: tuple[str, str]) -> _Touched:
        row = self._connection.execute(_LOAD, name).fetchone()
        if row is None:
            self._last_id += 1
            return _Touched(self._last_id, State(), stored=False)
        id, ledger, alive, type, text, doc, exact_from = row
        attributes, _ = wire.decode(doc)
        state = State(_ledger_decoder.decode(ledger), bool(alive), type, text, attributes, {}, exact_from)
        return _Touched(id, state, stored=True)

    def _forget(self, entity: _Touched, change: Change) -> None:
        """Erase what the forget wins over, and bring up what is left."""
        self.flush()
        self._connection.execute(_FORGET_EVENTS, (entity.id, *change.mark))
        self._connection.execute(_FORGET_EDGES, (entity.id,))
        stamps = entity.state.ledger.stamps
        entity.state = merge.fold([*history(self._connection, entity.id), change])
        entity.state.ledger.stamps = stamps

    def flush(self) -> None:
        """Write all that was taken since the last flush."""
        inserts: list[tuple[Any, ...]] = []
        updates: list[tuple[Any, ...]] = []
        edges: list[tuple[Any, ...]] = []
        unindexed: list[tuple[int, str]] = []
        indexed: list[tuple[int, str]] = []
        for (tenant, entity_id), entity in self._dirty.items():
            state = entity.state
            doc: Doc = state.attributes, state.spaces
            row = (
                entity.partition,
                entity.version,
                state.alive,
                state.exact_from,
                state.type,
                state.text,
                wire.encode(doc),
                _ledger_encoder.encode(state.ledger),
                entity.id,
            )
            if entity.stored:
                updates.append(row)
            else:
                inserts.append((*row, tenant, entity_id))
                entity.stored = True
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
        for statement, rows in (
            (_INSERT_ENTITY, inserts),
            (_UPDATE_ENTITY, updates),
            (_UPSERT_EDGE, edges),
            (_INSERT_EVENT, self._events),
            (_UNINDEX_TEXT, unindexed),
            (_INDEX_TEXT, indexed),
        ):
            if rows:
                self._connection.executemany(statement, rows)
        self._dirty.clear()
        self._events = []
