"""The tables of `memory.db`, how its connections are set up, and the history that both its sides read.

* `entity`: one row for each entity ever written, forgotten ones too (their tombstone is in `ledger`). `doc`
  holds `[attributes, spaces]`, which readers need; `ledger` the keys, which only merging needs; `size` is the bytes of
  its events' bodies. On a device, `held_state` is there where it has something of the hub's, and `held` are the bytes
  that its hub had sent then.
* `edge`: the last write to each (source, relation, target), removals too. A target need not exist: it is a text.
* `event`: the history that forgets have left, with effective stamps; of a vector only its dimension.
* `erasure`: the log sequences of forgets, and how many events each erased; and of what came after the forget that wins
  over it, which is to be taken out of the log.
* `quarantine`: events that are in the log and have no effect, for their stamps are too far ahead.
* `entity_text`: the full-text index over `entity.text`; the text itself is kept once, in `entity`.

Looks at `memory_shards.merge` and `merger`.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, TypeAlias

from memory_shards.merge import Change
from memory_shards.merger import Kept

LAYOUT = 6
"""Goes up with every change of the tables or of what is in them; a file of another layout is rebuilt."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entity (
    id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, entity_id TEXT NOT NULL, partition INTEGER NOT NULL,
    version INTEGER NOT NULL,     -- the log sequence of its last event, also of one without effect
    alive INTEGER NOT NULL,
    exact_from INTEGER NOT NULL,  -- ms; before that only the history tells what is true now
    type TEXT, doc BLOB NOT NULL, ledger BLOB NOT NULL, text TEXT,
    size INTEGER NOT NULL, held INTEGER, held_state TEXT,
    UNIQUE (tenant, entity_id));
CREATE INDEX IF NOT EXISTS entity_alive ON entity (alive);
CREATE INDEX IF NOT EXISTS entity_held ON entity (tenant, entity_id, held_state, held) WHERE held_state IS NOT NULL;
CREATE TABLE IF NOT EXISTS edge (
    source INTEGER NOT NULL, relation TEXT NOT NULL, target TEXT NOT NULL, tenant TEXT NOT NULL,
    removed INTEGER NOT NULL, valid_from INTEGER NOT NULL, stamp INTEGER NOT NULL, site TEXT NOT NULL,
    properties BLOB,
    PRIMARY KEY (source, relation, target)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS edge_in ON edge (tenant, target, relation);
CREATE TABLE IF NOT EXISTS event (
    sequence INTEGER PRIMARY KEY, entity INTEGER NOT NULL, tenant TEXT NOT NULL, event_id TEXT NOT NULL,
    op TEXT NOT NULL, agent TEXT NOT NULL, site TEXT NOT NULL, stamp INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL, valid_from INTEGER NOT NULL, valid_to INTEGER, body BLOB NOT NULL,
    hub INTEGER, saw INTEGER);    -- places in the hub's log: its own, and what its writer had seen
CREATE INDEX IF NOT EXISTS event_of_entity ON event (entity);
CREATE INDEX IF NOT EXISTS event_by_validity ON event (tenant, valid_from);
CREATE TABLE IF NOT EXISTS erasure (sequence INTEGER PRIMARY KEY, events INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (
    sequence INTEGER PRIMARY KEY, tenant TEXT NOT NULL, entity_id TEXT NOT NULL, event_id TEXT NOT NULL,
    site TEXT NOT NULL, hlc INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS quarantine_by_id ON quarantine (event_id);
CREATE INDEX IF NOT EXISTS quarantine_of_entity ON quarantine (tenant, entity_id);
CREATE VIRTUAL TABLE IF NOT EXISTS entity_text USING fts5 (
    text, content='entity', content_rowid='id', tokenize='unicode61');
"""

HISTORY = """
SELECT sequence, event_id, op, agent, site, stamp, recorded_at, valid_from, valid_to, body, hub, saw FROM event
WHERE entity = ? ORDER BY sequence
"""

Doc: TypeAlias = tuple[dict[str, Any], list[str]]
"""What `entity.doc` holds: the attributes, and the names of the spaces that have a vector."""


def connect(file: Path) -> sqlite3.Connection:
    """A connection in autocommit mode that may be handed to another thread, to be used by one at a time."""
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, cached_statements=512)
    # The log is the truth: a commit that a power cut takes back is replayed, for its watermark goes with it.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten, not only unlinked
    connection.execute("PRAGMA wal_autocheckpoint = 8192")  # pages: 9 µs an event for commits, 13 at the default
    connection.execute("PRAGMA cache_size = -32768")  # KiB
    # A statement over many rows journals the pages it touches, beyond 64 KiB in a file: 23 µs of SQL an event;
    # in memory 18.
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


def is_corrupt(error: BaseException) -> bool:
    """Whether a file is no longer what SQLite wrote: nothing but a rebuild helps."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def kept_events(connection: sqlite3.Connection, entity: int) -> list[Kept]:
    """What is left of an entity's events, in log order."""
    return [Kept(*row) for row in connection.execute(HISTORY, (entity,))]


def history(connection: sqlite3.Connection, entity: int) -> list[Change]:
    """The changes that these events made."""
    return [kept.change() for kept in kept_events(connection, entity)]
