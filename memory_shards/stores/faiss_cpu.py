"""The vector store `faiss:cpu`: every vector in SQLite, every space searchable in memory through FAISS.

`vectors.db` is what survives; the spaces in memory are rebuilt from it when the store is opened. `apply`
commits to the file first and then brings the spaces up to date, so a search right after it sees its records.
What is written to an entity without a vector only waits in the file (`waiting`) and comes to memory with its first
vector.

Every method runs on the one worker thread that owns the store, with one OpenMP thread (set for that thread on
each call, never for the process). Only graphs are built elsewhere, from copies, on a thread of the store.

Looks at `space`, `columns`, `vector_state`, `waiting`, `bulk`, `provenance`, at `memory_shards.merge` and at `mnemesh`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import msgspec
import numpy as np

from memory_shards.merge import Patch, is_repeated, patch_of, stamped
from memory_shards.stores.array_space import ArraySpace
from memory_shards.stores.bulk import execute_all, select_all
from memory_shards.stores.columns import Rows, parse_filter
from memory_shards.stores.provenance import keep_or_clear
from memory_shards.stores.space import Found, Halves, Space
from memory_shards.stores.sqlite_schema import connect
from memory_shards.stores.vector_state import Kept, VectorState
from memory_shards.stores.waiting import MOST_WAITING, merge_waiting, waiting_put
from mnemesh import wire
from mnemesh.errors import BadRequest, MnemeshError, NotFound
from mnemesh.event import Event, Record
from mnemesh.ids import PARTITIONS
from mnemesh.messages import Hit, IndexKind, Metric
from mnemesh.wire import Vector

_log = logging.getLogger(__name__)

_SCHEMA = f"""
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
_LAYOUT = 5
_STORED = """
WITH wanted (tenant, entity_id) AS (VALUES {rows})
SELECT number, tenant, entity_id, state, waiting FROM wanted CROSS JOIN entities USING (tenant, entity_id)
"""
_PUT_STATE = """
INSERT OR FAIL INTO entities (number, tenant, entity_id, state, waiting) VALUES {rows}
ON CONFLICT (number) DO UPDATE SET state = excluded.state, waiting = excluded.waiting
"""
_LET_WAIT = """
INSERT OR FAIL INTO entities (tenant, entity_id, state, waiting) VALUES {rows}
ON CONFLICT (tenant, entity_id) DO UPDATE SET waiting = CAST(waiting || excluded.waiting AS BLOB)
"""
_CROWDED = f"SELECT number, tenant, entity_id, state, waiting FROM entities WHERE length(waiting) > {MOST_WAITING}"
_ENTITY_BITS = 40
_ENTITY_MASK = (1 << _ENTITY_BITS) - 1
_LOAD_STEP = 8_192
_CACHE_KIB = 2_048
"""SQLite's page cache: the vectors are in memory already, and the file's pages in the system's cache. 32 MiB apply no
faster: 50,000 x 384 at 33,000/s with either, random updates of 300,000 entities at 25,000/s."""
_LARGEST_HALF = 65_504.0
_HALF = np.dtype("<f2")


AnySpace: TypeAlias = Space | ArraySpace


class VectorQuery(msgspec.Struct, frozen=True, kw_only=True):
    """One search: the `k` nearest to a float32 vector (d,) in a tenant's space that pass the filter."""

    tenant: str
    vector: Vector
    space: str = "default"
    k: int = 10
    type: str | None = None
    filter: dict[str, Any] = {}
    output_fields: list[str] = []
    include_vectors: bool = False


class SpaceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a vector space is, and how many vectors it holds here."""

    name: str
    dimension: int
    metric: Metric
    index: IndexKind
    model: str | None
    vectors: int


class SpaceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of an event's `spaces`: how a space is to be made. The first vector fixes it."""

    metric: Metric = "cosine"
    index: IndexKind = "auto"
    model: str | None = None


_AS_USUAL = SpaceSettings()


class FaissStore:
    """The vectors of some partitions (of all if `None`) of a site's log, in `folder`.

    A file that was built for another site, incarnation of the log or set of partitions is emptied. `rejected`
    counts the vectors and events that were skipped since the store was opened.
    """

    def __init__(
        self,
        folder: Path,
        partitions: Set[int] | None = None,
        *,
        site: str = "",
        incarnation: str = "",
        make_space: Callable[..., AnySpace] = Space,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rejected = 0
        self._site = site
        self._make_space = make_space
        self._partitions = frozenset(range(PARTITIONS) if partitions is None else partitions)
        self._spaces: dict[tuple[str, str], AnySpace] = {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="faiss-build", initializer=_give_way)
        self._closing = threading.Event()
        self._db = connect(folder / "vectors.db")
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        keep_or_clear(self._db, site=site, partitions=self._partitions, incarnation=incarnation, layout=_LAYOUT)
        self._db.executescript(_SCHEMA)
        self._watermark: int
        (self._watermark,) = self._db.execute("SELECT sequence FROM watermark").fetchone()
        (self._last_entity,) = self._db.execute("SELECT coalesce(max(number), 0) FROM entities").fetchone()
        for number, tenant, name, *settings in self._db.execute("SELECT * FROM spaces").fetchall():
            self._spaces[tenant, name] = space = make_space(number, *settings)
            self._load(space)
            space.maintain(self._submit)

    @property
    def watermark(self) -> int:
        """The last log sequence applied and committed."""
        return self._watermark

    def close(self) -> None:
        """Stop building, release the file and the thread."""
        self._closing.set()
        self._builder.shutdown(cancel_futures=True)
        self._db.close()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def shows(self, record: Record) -> bool:
        """Those that bring a vector or may take one away, and those about an entity that has one."""
        event = record.event
        return (
            event.op in ("forget", "release")
            or bool(event.body.get("vectors"))
            or any(
                tenant == event.tenant and event.entity_id in space.rows for (tenant, _), space in self._spaces.items()
            )
        )

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        """Commit the effects of `records` with the watermark, then let searches see them.

        A vector that cannot be in its space (another dimension, beyond fp16) is skipped, counted in
        `rejected` and logged; the rest of its event counts. So is an event that breaks the layout. Raises
        `sqlite3.Error`, and has no effect then.
        """
        if watermark <= self._watermark:
            return
        faiss.omp_set_num_threads(1)
        known = set(self._spaces)
        try:
            entities, waiting = self._merged(records)
            halved = self._halved(entities)
            made = [name for name in self._spaces if name not in known]
            self._commit(entities, waiting, halved, made, watermark)
        except BaseException:
            self._spaces = {name: space for name, space in self._spaces.items() if name in known}
            raise
        self._watermark = watermark
        self._show(entities, halved)

    @property
    def is_settled(self) -> bool:
        """Always: what records erase is gone when they are committed."""
        return True

    def settle(self) -> None:
        """There is nothing left to do."""

    def _merged(self, records: Iterable[Record]) -> tuple[list[VectorState], _Waiting]:
        """The entities that the records change, as they are after all of them, and the puts that are left to wait."""
        fresh = [each for each in records if each.sequence > self._watermark and self._concerns(each)]
        known = self._known(fresh)
        entities: dict[tuple[str, str], VectorState] = {}
        waiting: dict[tuple[str, str], list[bytes]] = defaultdict(list)
        for record in fresh:
            event = record.event
            name = event.tenant, event.entity_id
            if event.op == "release":
                entities[name] = known[name]
                known[name].release(self._site)
                continue
            try:
                patch = patch_of(event)
            except MnemeshError as error:
                self.rejected += 1
                _log.warning("event %d of the log is skipped: %s", record.sequence, error)
                continue
            entity = known.get(name)
            if entity is None:
                waiting[name].append(waiting_put(record, patch))
            elif not is_repeated(record, entity.births, entity.stamps):
                entities[name] = entity
                kept = partial(self._kept_in, entity)
                entity.merge(stamped(record, patch, entity.stamps), self._accepted(record, patch), kept)
        return list(entities.values()), [(*name, b"", b"".join(puts)) for name, puts in waiting.items()]

    def _concerns(self, record: Record) -> bool:
        return record.partition in self._partitions and record.event.op != "hold" and not record.quarantined

    def _known(self, records: Iterable[Record]) -> dict[tuple[str, str], VectorState]:
        """The entities whose records cannot wait: those that have a vector, get one, or are forgotten."""
        names = {(record.event.tenant, record.event.entity_id): None for record in records if self.shows(record)}
        known = {}
        for number, tenant, entity_id, state, waiting in select_all(self._db, _STORED, list(names)):
            known[tenant, entity_id] = entity = VectorState(number, tenant, entity_id, state)
            merge_waiting(entity, waiting)
        for name in names:
            if name not in known:
                self._last_entity += 1
                known[name] = VectorState(self._last_entity, *name)
        return known

    def _stored(self, tenant: str, entity_ids: Iterable[str]) -> dict[str, VectorState]:
        """Entities as they are in the file, for readers: what waits has no vector, and so does not concern them."""
        names = [(tenant, entity_id) for entity_id in entity_ids]
        found = select_all(self._db, _STORED, names)
        return {entity_id: VectorState(number, tenant, entity_id, state) for number, _, entity_id, state, _ in found}

    def _accepted(self, record: Record, patch: Patch) -> dict[str, Vector]:
        """The vectors of a put that fit their spaces; a space is made for the first one that names it."""
        accepted = {}
        for name, value in patch.vectors.items():
            try:
                # `patch_of` has checked it already, and that costs as much as a row of SQLite.
                is_plain = isinstance(value, np.ndarray) and value.dtype == np.float32
                accepted[name] = self._fitting(record.event, name, value if is_plain else wire.as_vector(value))
            except MnemeshError as error:
                self.rejected += 1
                _log.warning("event %d: its vector in %r is skipped: %s", record.sequence, name, error)
        return accepted

    def _fitting(self, event: Event, name: str, vector: Vector) -> Vector:
        space = self._spaces.get((event.tenant, name))
        if space is None:
            given = wire.convert(event.body.get("spaces", {}), dict[str, SpaceSettings])
            settings = given.get(name, _AS_USUAL)
            number = 1 + max((space.number for space in self._spaces.values()), default=0)
            space = self._make_space(number, len(vector), settings.metric, settings.index, settings.model)
        if len(vector) != space.dimension:
            raise BadRequest(f"it has {len(vector)} dimensions, the space has {space.dimension}")
        if space.metric != "cosine" and np.abs(vector).max() > _LARGEST_HALF:
            raise BadRequest(f"a number is beyond fp16 (±{_LARGEST_HALF:.0f})")
        self._spaces[event.tenant, name] = space
        return vector

    def _halved(self, entities: Iterable[VectorState]) -> list[_Halved]:
        """For each space its new vectors as they will be kept, with their entities and lengths."""
        fresh: dict[tuple[str, str], list[VectorState]] = defaultdict(list)
        for entity in entities:
            for name, vector in entity.vectors.items():
                if vector is not None:
                    fresh[entity.tenant, name].append(entity)
        halved = []
        for (tenant, name), owners in fresh.items():
            space = self._spaces[tenant, name]
            halved.append((space, owners, *_halves_of(space, [owner.vectors[name] for owner in owners])))
        return halved

    def _commit(
        self,
        entities: Sequence[VectorState],
        waiting: _Waiting,
        halved: Iterable[_Halved],
        made: Iterable[tuple[str, str]],
        watermark: int,
    ) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            for tenant, name in made:
                space = self._spaces[tenant, name]
                settings = space.dimension, space.metric, space.index, space.model
                db.execute("INSERT INTO spaces VALUES (?, ?, ?, ?, ?, ?, ?)", (space.number, tenant, name, *settings))
            self._put_states([entity for entity in entities if entity.stamps])
            released = [(entity.number,) for entity in entities if not entity.stamps]
            db.executemany("DELETE FROM entities WHERE number = ?", released)
            if waiting:
                execute_all(db, _LET_WAIT, waiting)
                crowded = [(VectorState(*row), puts) for *row, puts in db.execute(_CROWDED).fetchall()]
                for entity, puts in crowded:
                    merge_waiting(entity, puts)
                self._put_states([entity for entity, _ in crowded])
                (self._last_entity,) = db.execute("SELECT max(number) FROM entities").fetchone()
            db.executemany(
                "DELETE FROM vectors WHERE place = ?",
                [(_place(space, each.number),) for each in entities for space in self._left(each)],
            )
            for space, owners, halves, lengths in halved:
                places = [_place(space, owner.number) for owner in owners]
                execute_all(
                    db,
                    "INSERT OR REPLACE INTO vectors VALUES {rows}",
                    list(zip(places, lengths, map(memoryview, halves), strict=True)),  # type: ignore[arg-type]
                )
            db.execute("UPDATE watermark SET sequence = ?", (watermark,))
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _put_states(self, entities: Iterable[VectorState]) -> None:
        rows = [(each.number, each.tenant, each.entity_id, each.encode(), b"") for each in entities]
        execute_all(self._db, _PUT_STATE, rows)

    def _show(self, entities: Iterable[VectorState], halved: Iterable[_Halved]) -> None:
        """Bring the spaces in memory to what was committed."""
        touched = {space.number: space for space, *_ in halved}
        for space in touched.values():
            space.adopt()
        for space, owners, halves, _ in halved:
            space.put([owner.entity_id for owner in owners], halves)
        for entity in entities:
            for space in self._left(entity):
                space.remove(entity.entity_id)
                touched[space.number] = space
            attributes = entity.attributes
            for name in entity.spaces:
                space = self._spaces[entity.tenant, name]
                names = entity.changed | attributes.keys() if name in entity.vectors else entity.changed
                space.describe(entity.entity_id, entity.type, attributes, names)
        for space in touched.values():
            space.maintain(self._submit)

    def _left(self, entity: VectorState) -> list[AnySpace]:
        """The spaces that the entity's vector was taken out of."""
        return [
            self._spaces[entity.tenant, name]
            for name, vector in entity.vectors.items()
            if vector is None and (entity.tenant, name) in self._spaces
        ]

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────

    def search(self, queries: Sequence[VectorQuery]) -> list[list[Hit] | MnemeshError]:
        """The hits of each query, best first, in the order of the queries.

        In place of a query that fails stands its error: `NotFound` for an unknown space, `BadRequest` for a
        vector of another dimension or a wrong filter. Queries of one space without a filter share one call.
        """
        faiss.omp_set_num_threads(1)
        answers: dict[int, list[Hit] | MnemeshError] = {}
        together: dict[int, list[tuple[int, Vector]]] = defaultdict(list)
        spaces: dict[int, AnySpace] = {}
        for position, query in enumerate(queries):
            try:
                space, vector, passing = self._planned(query)
            except MnemeshError as error:
                answers[position] = error
                continue
            if passing is None:
                spaces[space.number] = space
                together[space.number].append((position, vector))
            else:
                found = space.search(vector[None], query.k, passing)
                answers[position] = self._hits(query, space, found, 0)
        for number, waiting in together.items():
            space = spaces[number]
            most = max(queries[position].k for position, _ in waiting)
            found = space.search(np.stack([vector for _, vector in waiting]), most)
            for line, (position, _) in enumerate(waiting):
                answers[position] = self._hits(queries[position], space, found, line)
        return [answers[position] for position in range(len(queries))]

    def _planned(self, query: VectorQuery) -> tuple[AnySpace, Vector, Rows | None]:
        """The space, the checked vector, and the rows that pass the filter (`None` without one)."""
        space = self._spaces.get((query.tenant, query.space))
        if space is None:
            raise NotFound(f"no vector space {query.space!r}")
        vector = wire.as_vector(query.vector)
        if len(vector) != space.dimension:
            raise BadRequest(f"the vector has {len(vector)} dimensions, space {query.space!r} has {space.dimension}")
        conditions = parse_filter(query.filter)
        space.adopt()
        space.maintain(self._submit)
        if not conditions and query.type is None:
            return space, vector, None
        return space, vector, space.select(query.type, conditions)

    def _hits(self, query: VectorQuery, space: AnySpace, found: Found, line: int) -> list[Hit]:
        scores, rows = (found[part][line, : query.k].tolist() for part in range(2))
        entity_ids = list(map(space.entity_at, rows))
        if not query.output_fields and not query.include_vectors:
            return [Hit(entity_id=name, score=score) for name, score in zip(entity_ids, scores, strict=True)]
        entities = self._stored(query.tenant, entity_ids)
        hits = []
        for entity_id, score in zip(entity_ids, scores, strict=True):
            entity = entities[entity_id]  # a row in memory is an entity in the file
            attributes = vector = None
            if query.output_fields:
                held = entity.attributes
                attributes = {name: held[name] for name in query.output_fields if name in held}
            if query.include_vectors:
                vector = self._vector(space, entity.number)
            hits.append(Hit(entity_id=entity_id, score=score, attributes=attributes, vector=vector))
        return hits

    def _vector(self, space: AnySpace, entity: int) -> Vector:
        length, halves = self._kept(space, entity)
        return np.frombuffer(halves, _HALF).astype(np.float32) * np.float32(length)

    def _kept_in(self, entity: VectorState, space: str) -> Kept:
        return self._kept(self._spaces[entity.tenant, space], entity.number)

    def _kept(self, space: AnySpace, entity: int) -> Kept:
        place = _place(space, entity)
        kept: Kept = self._db.execute("SELECT length, halves FROM vectors WHERE place = ?", (place,)).fetchone()
        return kept

    def vectors_of(self, tenant: str, entity_id: str) -> dict[str, Vector]:
        """An entity's vectors by space, float32 to the precision of fp16; none for a stranger."""
        entity = self._stored(tenant, [entity_id]).get(entity_id)
        if entity is None:
            return {}
        return {name: self._vector(self._spaces[tenant, name], entity.number) for name in entity.spaces}

    def spaces(self, tenant: str) -> list[SpaceInfo]:
        """The vector spaces of a tenant, by name."""
        return [
            SpaceInfo(
                name=name,
                dimension=space.dimension,
                metric=space.metric,
                index=space.index,
                model=space.model,
                vectors=len(space.rows),
            )
            for (owner, name), space in sorted(self._spaces.items())
            if owner == tenant
        ]

    def count(self) -> int:
        """How many vectors there are."""
        return sum(len(space.rows) for space in self._spaces.values())

    def digest(self) -> str:
        """A hash of all vectors with their entities' types and attributes, the same on replicas that know the same.

        Reads the whole file. What only tells how it came about (stamps, tombstones, row numbers) is left out, and so
        are entities without a vector: whether their puts still wait is nobody's concern.
        """
        digest = hashlib.blake2b(digest_size=16)
        for row in self._db.execute("SELECT number, tenant, entity_id, state FROM entities ORDER BY tenant, entity_id"):
            entity = VectorState(*row)
            vectors = [(name, *self._kept(self._spaces[entity.tenant, name], entity.number)) for name in entity.spaces]
            if vectors:
                attributes = _sorted(entity.attributes)
                digest.update(wire.encode([entity.tenant, entity.entity_id, entity.type, attributes, vectors]))
        return digest.hexdigest()

    # ── the index in memory ─────────────────────────────────────────────────────────────────────────────────

    def wait_until_built(self) -> None:
        """Wait for the graphs under construction, and search with them from now on."""
        wait([space.build for space in self._spaces.values() if space.build])
        for space in self._spaces.values():
            space.adopt()

    def _load(self, space: AnySpace) -> None:
        rows = self._db.execute(
            "SELECT entity_id, state, halves FROM vectors JOIN entities ON number = place & ?"
            " WHERE place BETWEEN ? AND ? ORDER BY place",
            (_ENTITY_MASK, _place(space, 0), _place(space, _ENTITY_MASK)),
        )
        while some := rows.fetchmany(_LOAD_STEP):
            halves = np.frombuffer(b"".join(half for *_, half in some), _HALF)
            space.put([entity_id for entity_id, *_ in some], halves.reshape(len(some), -1))
            for entity_id, state, _ in some:
                entity = VectorState(0, "", entity_id, state)
                attributes = entity.attributes
                space.describe(entity_id, entity.type, attributes, attributes)

    def _submit(self, build: Callable[[Callable[[], bool]], Any]) -> Future[Any]:
        return self._builder.submit(build, self._closing.is_set)


_Waiting: TypeAlias = list[tuple[str, str, bytes, bytes]]
"""(tenant, entity, no state, puts one after another) of entities without a vector."""

_Halved: TypeAlias = tuple[AnySpace, list[VectorState], Halves, list[float]]
"""A space, the entities with new vectors in it, and the vectors as they are kept: fp16 (n, d), n lengths."""


def _give_way() -> None:
    """Let every other thread of the machine go first, where threads have a priority of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _halves_of(space: AnySpace, vectors: Sequence[Vector | Kept | None]) -> tuple[Halves, list[float]]:
    """(n, d) halves and n lengths: of new vectors, and of those that were kept so before."""
    halves = np.empty((len(vectors), space.dimension), np.float16)
    lengths = [0.0] * len(vectors)
    fresh = [place for place, vector in enumerate(vectors) if isinstance(vector, np.ndarray)]
    if fresh:
        halves[fresh], new_lengths = space.halve(np.stack([vectors[place] for place in fresh]))  # type: ignore[misc]
        for place, length in zip(fresh, new_lengths.tolist(), strict=True):
            lengths[place] = length
    for place, vector in enumerate(vectors):
        if isinstance(vector, list | tuple):
            lengths[place], halves[place] = vector[0], np.frombuffer(vector[1], _HALF)
    return halves, lengths


def _place(space: AnySpace, entity: int) -> int:
    return space.number << _ENTITY_BITS | entity


def _sorted(value: object) -> object:
    """The value with the keys of its maps in order."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
