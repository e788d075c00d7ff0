"""The file of vectors: its tables, and what is read of them.

`vectors.db` has every vector of a shard, with what its entity is by the log. Looks at `halves`, `vector_state`,
`waiting`, `bulk`, `memory_shards.digests` and `mnemesh`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np

from memory_shards.digests import Digests
from memory_shards.stores.bulk import select_all
from memory_shards.stores.halves import HALF
from memory_shards.stores.vector_state import Kept, VectorState, description_of
from memory_shards.stores.waiting import MOST_WAITING
from mnemesh.messages import IndexKind, Metric
from mnemesh.wire import Vector

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS watermark (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL);
INSERT OR IGNORE INTO watermark VALUES (1, 0);
CREATE TABLE IF NOT EXISTS spaces (
    number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, dimension INTEGER NOT NULL,
    metric TEXT NOT NULL, kind TEXT NOT NULL, model TEXT, UNIQUE (tenant, name));
CREATE TABLE IF NOT EXISTS entities (
    number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, entity_id TEXT NOT NULL,
    state BLOB NOT NULL,    -- empty until there is one
    waiting BLOB NOT NULL,  -- puts that came after it; empty while the entity has a vector
    UNIQUE (tenant, entity_id));
CREATE INDEX IF NOT EXISTS crowded ON entities (number) WHERE length(waiting) > {MOST_WAITING};
-- place = space number << 40 | entity number: one B-tree, in which each space is one contiguous range.
CREATE TABLE IF NOT EXISTS vectors (place INTEGER PRIMARY KEY, length REAL NOT NULL, halves BLOB NOT NULL);
"""
LAYOUT = 5
STORED = """
WITH wanted (tenant, entity_id) AS (VALUES {rows})
SELECT number, tenant, entity_id, state, waiting FROM wanted CROSS JOIN entities USING (tenant, entity_id)
"""
_ENTITY_BITS = 40
_ENTITY_MASK = (1 << _ENTITY_BITS) - 1
READ_STEP = 256
"""Vectors that are read at once. A start with 1,000,000 needs 6 MiB less than with 1,024, and no longer."""


class VectorSpace(msgspec.Struct, frozen=True):
    """One vector space of a tenant. `number` is its key in the file."""

    number: int
    tenant: str
    name: str
    dimension: int
    metric: Metric
    index: IndexKind
    model: str | None


class StoredVector(NamedTuple):
    """A vector of a space, as it is read from the file: fp16 (d,) bytes that times `length` are the vector."""

    entity: VectorState
    length: float
    halves: bytes

    @property
    def vector(self) -> Vector:
        """Float32 (d,) to the precision of fp16."""
        return _vector(self.length, self.halves)


class Shown(NamedTuple):
    """What is searched of a vector: its entity, what that may be filtered by, and its fp16 (d,) bytes."""

    entity_id: str
    type: str | None
    attributes: dict[str, Any]
    halves: bytes


class VectorReader:
    """What the file holds, read on a connection of its own. Belongs to one thread at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def close(self) -> None:
        self._db.close()

    def spaces(self) -> list[VectorSpace]:
        """The vector spaces, in the order in which they came."""
        return [VectorSpace(*row) for row in self._db.execute("SELECT * FROM spaces ORDER BY number")]

    def stored(self, tenant: str, entity_ids: Iterable[str]) -> dict[str, VectorState]:
        """Entities as they are in the file, for readers: what waits has no vector, and so does not concern them."""
        names = [(tenant, entity_id) for entity_id in entity_ids]
        found = select_all(self._db, STORED, names)
        return {entity_id: VectorState(number, tenant, entity_id, state) for number, _, entity_id, state, _ in found}

    def vector(self, space: VectorSpace, entity: int) -> Vector | None:
        """The vector of an entity by its number, float32 (d,) to the precision of fp16; `None` if it is just gone."""
        kept = self.kept(space, entity)
        return None if kept is None else _vector(*kept)

    def kept(self, space: VectorSpace, entity: int) -> Kept | None:
        """The vector of an entity by its number, as it is in the file."""
        place = place_of(space, entity)
        kept: Kept | None = self._db.execute("SELECT length, halves FROM vectors WHERE place = ?", (place,)).fetchone()
        return kept

    def vectors_of(self, tenant: str, entity_id: str) -> dict[str, Vector]:
        """An entity's vectors by space, float32 to the precision of fp16; none for a stranger."""
        entity = self.stored(tenant, [entity_id]).get(entity_id)
        if entity is None or not entity.spaces:
            return {}
        spaces = {space.name: space for space in self.spaces() if space.tenant == tenant}
        found = {name: self.vector(spaces[name], entity.number) for name in entity.spaces if name in spaces}
        return {name: vector for name, vector in found.items() if vector is not None}

    def vectors_in(self, space: VectorSpace) -> Iterator[list[StoredVector]]:
        """All vectors of a space with their entities, some at a time."""
        rows = self._rows("number, tenant, entity_id, state, length, halves", space)
        while some := rows.fetchmany(READ_STEP):
            yield [StoredVector(VectorState(*state), length, halves) for *state, length, halves in some]

    def shown_in(self, space: VectorSpace) -> Iterator[list[Shown]]:
        """What a search of a space needs of all its vectors, some at a time."""
        rows = self._rows("entity_id, state, halves", space)
        while some := rows.fetchmany(READ_STEP):
            yield [Shown(entity_id, *description_of(state), halves) for entity_id, state, halves in some]

    def _rows(self, columns: str, space: VectorSpace) -> sqlite3.Cursor:
        joined = f"SELECT {columns} FROM vectors JOIN entities ON number = place & ?"
        return self._db.execute(f"{joined} WHERE place BETWEEN ? AND ? ORDER BY place", (_ENTITY_MASK, *_places(space)))

    def count(self, space: VectorSpace | None = None) -> int:
        """How many vectors there are, of one space or of all."""
        places = (0, 1 << 62) if space is None else _places(space)
        (count,) = self._db.execute("SELECT count(*) FROM vectors WHERE place BETWEEN ? AND ?", places).fetchone()
        return int(count)

    def digests(self) -> Digests:
        """Of all vectors with their entities' types and attributes, the same on replicas that know the same.

        Reads the whole file. What only tells how it came about (stamps, tombstones, row numbers) is left out, and so
        are entities without a vector: whether their puts still wait is nobody's concern.
        """
        spaces = {(space.tenant, space.name): space for space in self.spaces()}
        digests = Digests()
        for row in self._db.execute("SELECT number, tenant, entity_id, state FROM entities"):
            entity = VectorState(*row)
            vectors = [(name, self.kept(spaces[entity.tenant, name], entity.number)) for name in entity.spaces]
            if vectors:
                digests.add(entity.tenant, entity.entity_id, (entity.type, entity.attributes, vectors))
        return digests


def _vector(length: float, halves: bytes) -> Vector:
    return np.frombuffer(halves, HALF).astype(np.float32) * np.float32(length)


def _places(space: VectorSpace) -> tuple[int, int]:
    """The first and the last place that a vector of a space may have."""
    return place_of(space, 0), place_of(space, _ENTITY_MASK)


def place_of(space: VectorSpace, entity: int) -> int:
    return space.number << _ENTITY_BITS | entity
