"""The file of vectors, as it is written: every vector of a shard in SQLite, with what its entity is by the log.

It is what survives; what searches it is built from it: spaces in memory (`memory_vectors`), or a server
(`milvus_store`). What is written to an entity without a vector only waits in the file (`waiting`) and is merged with
its first vector.

`VectorFile` belongs to one worker thread. Looks at `vector_reader`, `halves`, `vector_state`, `waiting`, `bulk`,
`provenance`, at `memory_shards.merge` and at `mnemesh`.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec.structs import astuple

from memory_shards.merge import Patch, is_repeated, patch_of, stamped
from memory_shards.stores.bulk import execute_all, select_all
from memory_shards.stores.halves import Halves, halves_of
from memory_shards.stores.provenance import keep_or_clear
from memory_shards.stores.sqlite_schema import connect
from memory_shards.stores.vector_reader import LAYOUT, SCHEMA, STORED, VectorReader, VectorSpace, place_of
from memory_shards.stores.vector_state import Kept, VectorState
from memory_shards.stores.waiting import MOST_WAITING, merge_waiting, waiting_put
from mnemesh import wire
from mnemesh.errors import BadRequest, MnemeshError
from mnemesh.event import Event, Record
from mnemesh.ids import PARTITIONS
from mnemesh.messages import IndexKind, Metric
from mnemesh.wire import Vector

_log = logging.getLogger(__name__)

_PUT_STATE = """
INSERT OR FAIL INTO entities (number, tenant, entity_id, state, waiting) VALUES {rows}
ON CONFLICT (number) DO UPDATE SET state = excluded.state, waiting = excluded.waiting
"""
_LET_WAIT = """
INSERT OR FAIL INTO entities (tenant, entity_id, state, waiting) VALUES {rows}
ON CONFLICT (tenant, entity_id) DO UPDATE SET waiting = CAST(waiting || excluded.waiting AS BLOB)
"""
_HAS_STATE = "SELECT 1 FROM entities WHERE tenant = ? AND entity_id = ? AND length(state) > 0"
_CROWDED = f"SELECT number, tenant, entity_id, state, waiting FROM entities WHERE length(waiting) > {MOST_WAITING}"
_CACHE_KIB = 2_048
"""SQLite's page cache: the vectors are in memory already, and the file's pages in the system's cache. 32 MiB apply no
faster: 50,000 x 384 at 33,000/s with either, random updates of 300,000 entities at 25,000/s."""
_LARGEST_HALF = 65_504.0


class SpaceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of an event's `spaces`: how a space is to be made. The first vector fixes it."""

    metric: Metric = "cosine"
    index: IndexKind = "auto"
    model: str | None = None


_AS_USUAL = SpaceSettings()


class Halved(NamedTuple):
    """A space, the entities with new vectors in it, and the vectors as they are kept: fp16 (n, d), n lengths."""

    space: VectorSpace
    owners: list[VectorState]
    halves: Halves
    lengths: list[float]


class Changes(NamedTuple):
    """What a batch changed: the entities that it touched, their vectors that are gone, and those that are new."""

    entities: list[VectorState]
    gone: list[tuple[VectorState, VectorSpace]]
    halved: list[Halved]


Holds: TypeAlias = Callable[[str, str], bool]
"""Whether an entity of a tenant has a vector."""


class VectorFile:
    """The vectors of some partitions (of all if `None`) of a site's log, in `folder`.

    A file that was built for another site, incarnation of the log or set of partitions is emptied. `rejected`
    counts the vectors and events that were skipped since the store was opened. `holds`, if whoever searches it knows,
    saves asking the file.
    """

    def __init__(
        self,
        folder: Path,
        partitions: Set[int] | None = None,
        *,
        site: str = "",
        incarnation: str = "",
        holds: Holds | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rejected = 0
        self._site = site
        self.file = folder / "vectors.db"
        self._partitions = frozenset(range(PARTITIONS) if partitions is None else partitions)
        self._db = connect(self.file)
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        keep_or_clear(self._db, site=site, partitions=self._partitions, incarnation=incarnation, layout=LAYOUT)
        self._db.executescript(SCHEMA)
        self._watermark = self.stands_in(self._db)
        (self._last_entity,) = self._db.execute("SELECT coalesce(max(number), 0) FROM entities").fetchone()
        self.read = VectorReader(self._db)
        """What is there, for the store's own thread."""
        self.spaces = {(space.tenant, space.name): space for space in self.read.spaces()}
        self._holds = holds or self._has_state

    @property
    def watermark(self) -> int:
        """The last log sequence applied and committed."""
        return self._watermark

    @staticmethod
    def stands_in(connection: sqlite3.Connection) -> int:
        """Up to where a file like this one has the log."""
        return int(connection.execute("SELECT sequence FROM watermark").fetchone()[0])

    def reader(self) -> VectorReader:
        """One for another thread."""
        return VectorReader(connect(self.file))

    def digest(self) -> str:
        return self.read.digests().whole()

    def close(self) -> None:
        self._db.close()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def shows(self, record: Record) -> bool:
        """Those that bring a vector or may take one away, and those about an entity that has one."""
        event = record.event
        return (
            event.op in ("forget", "release")
            or bool(event.body.get("vectors"))
            or self._holds(event.tenant, event.entity_id)
        )

    def _has_state(self, tenant: str, entity_id: str) -> bool:
        return self._db.execute(_HAS_STATE, (tenant, entity_id)).fetchone() is not None

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        """Commit the effects of `records` with the watermark.

        A vector that cannot be in its space (another dimension, beyond fp16) is skipped, counted in
        `rejected` and logged; the rest of its event counts. So is an event that breaks the layout. Raises
        `sqlite3.Error`, and has no effect then.
        """
        self.changes(records, watermark)

    def changes(self, records: Sequence[Record], watermark: int) -> Changes:
        """`apply`, and what it changed."""
        if watermark <= self._watermark:
            return Changes([], [], [])
        known = set(self.spaces)
        try:
            entities, waiting = self._merged(records)
            changes = Changes(entities, *self._halved(entities))
            made = [space for name, space in self.spaces.items() if name not in known]
            self._commit(changes, waiting, made, watermark)
        except BaseException:
            self.spaces = {name: space for name, space in self.spaces.items() if name in known}
            raise
        self._watermark = watermark
        return changes

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
        for number, tenant, entity_id, state, waiting in select_all(self._db, STORED, list(names)):
            known[tenant, entity_id] = entity = VectorState(number, tenant, entity_id, state)
            merge_waiting(entity, waiting)
        for name in names:
            if name not in known:
                self._last_entity += 1
                known[name] = VectorState(self._last_entity, *name)
        return known

    def _accepted(self, record: Record, patch: Patch) -> dict[str, Vector]:
        """The vectors of a put that fit their spaces; a space is made for the first one that names it."""
        accepted = {}
        for name, vector in patch.vectors.items():
            try:
                accepted[name] = self._fitting(record.event, name, vector)
            except MnemeshError as error:
                self.rejected += 1
                _log.warning("event %d: its vector in %r is skipped: %s", record.sequence, name, error)
        return accepted

    def _fitting(self, event: Event, name: str, vector: Vector) -> Vector:
        space = self.spaces.get((event.tenant, name))
        if space is None:
            given = wire.convert(event.body.get("spaces", {}), dict[str, SpaceSettings])
            made = given.get(name, _AS_USUAL)
            number = 1 + max((space.number for space in self.spaces.values()), default=0)
            space = VectorSpace(number, event.tenant, name, len(vector), made.metric, made.index, made.model)
        if len(vector) != space.dimension:
            raise BadRequest(f"it has {len(vector)} dimensions, the space has {space.dimension}")
        if space.metric != "cosine" and np.abs(vector).max() > _LARGEST_HALF:
            raise BadRequest(f"a number is beyond fp16 (±{_LARGEST_HALF:.0f})")
        self.spaces[event.tenant, name] = space
        return vector

    def _halved(self, entities: Iterable[VectorState]) -> tuple[list[tuple[VectorState, VectorSpace]], list[Halved]]:
        """The vectors that are gone; and of each space the new ones as they will be kept."""
        gone = []
        fresh: dict[tuple[str, str], list[VectorState]] = defaultdict(list)
        for entity in entities:
            for name, vector in entity.vectors.items():
                if vector is not None:
                    fresh[entity.tenant, name].append(entity)
                elif space := self.spaces.get((entity.tenant, name)):
                    gone.append((entity, space))
        halved = []
        for (tenant, name), owners in fresh.items():
            space = self.spaces[tenant, name]
            vectors = [owner.vectors[name] for owner in owners]
            halved.append(Halved(space, owners, *halves_of(vectors, space.dimension, space.metric)))
        return gone, halved

    def _commit(self, changes: Changes, waiting: _Waiting, made: Iterable[VectorSpace], watermark: int) -> None:
        db, entities = self._db, changes.entities
        db.execute("BEGIN IMMEDIATE")
        try:
            for space in made:
                db.execute("INSERT INTO spaces VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(space))
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
                [(place_of(space, entity.number),) for entity, space in changes.gone],
            )
            for space, owners, halves, lengths in changes.halved:
                places = [place_of(space, owner.number) for owner in owners]
                rows = list(zip(places, lengths, halves, strict=True))
                execute_all(db, "INSERT OR REPLACE INTO vectors VALUES {rows}", rows)
            db.execute("UPDATE watermark SET sequence = ?", (watermark,))
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _put_states(self, entities: Iterable[VectorState]) -> None:
        rows = [(each.number, each.tenant, each.entity_id, each.encode(), b"") for each in entities]
        execute_all(self._db, _PUT_STATE, rows)

    def _kept_in(self, entity: VectorState, space: str) -> Kept:
        kept = self.read.kept(self.spaces[entity.tenant, space], entity.number)
        assert kept is not None, "a state says so, and nobody else writes"
        return kept


_Waiting: TypeAlias = list[tuple[str, str, bytes, bytes]]
"""(tenant, entity, no state, puts one after another) of entities without a vector."""
