"""Vectors that are searched in this process: those of the file, each space in memory through FAISS or an accelerator.

The spaces are built from the file when the store is opened; `apply` commits to the file first and then brings them up
to date, so a search right after it sees its records.

Every method runs on the one worker thread that owns the store, with one OpenMP thread (set for that thread on
each call, never for the process). Only what searches most of a space is built elsewhere, on a thread of the store.

Looks at `vector_file`, `space`, `array_space`, `columns` and `mnemesh`.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np

from memory_shards.digests import Digests
from memory_shards.stores import VectorQuery
from memory_shards.stores.array_space import ArraySpace
from memory_shards.stores.columns import Rows, parse_filter
from memory_shards.stores.flat import Found
from memory_shards.stores.halves import HALF
from memory_shards.stores.space import Space
from memory_shards.stores.vector_file import Changes, VectorFile
from memory_shards.stores.vector_reader import VectorSpace
from mnemesh import wire
from mnemesh.errors import BadRequest, MnemeshError, NotFound
from mnemesh.event import Record
from mnemesh.messages import Hit
from mnemesh.wire import Vector

AnySpace: TypeAlias = Space | ArraySpace

LARGEST_ASKED = 1e15
"""A number of a query that is not normalised: times what vectors may have it is far from fp32's largest."""


class MemoryVectors:
    """The vectors of some partitions (of all if `None`) of a site's log: kept in `folder`, searched in memory.

    `make_space` says where: it takes what `Space` does.
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
        self._make_space = make_space
        self._spaces: dict[tuple[str, str], AnySpace] = {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="faiss-build", initializer=_give_way)
        self._closing = threading.Event()
        self.stored = VectorFile(folder, partitions, site=site, incarnation=incarnation, holds=self._holds)
        for stored in self.stored.spaces.values():
            space = self._made(stored)
            self._load(stored, space)
            space.maintain(self._submit)

    @property
    def file(self) -> Path:
        return self.stored.file

    @staticmethod
    def stands_in(connection: sqlite3.Connection) -> int:
        return VectorFile.stands_in(connection)

    @property
    def watermark(self) -> int:
        """The last log sequence applied and committed."""
        return self.stored.watermark

    @property
    def rejected(self) -> int:
        """How many vectors and events were skipped since it was opened."""
        return self.stored.rejected

    def close(self) -> None:
        """Stop building, release the file and the thread."""
        self._closing.set()
        self._builder.shutdown(cancel_futures=True)
        for space in self._spaces.values():
            space.close()
        self.stored.close()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def shows(self, record: Record) -> bool:
        return self.stored.shows(record)

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        """Commit the effects of `records` with the watermark, then let searches see them. As `VectorFile.apply`."""
        faiss.omp_set_num_threads(1)
        self._show(self.stored.changes(records, watermark))

    @property
    def is_settled(self) -> bool:
        return self.stored.is_settled

    def settle(self) -> None:
        self.stored.settle()

    def _show(self, changes: Changes) -> None:
        """Bring the spaces in memory to what was committed."""
        if len(self._spaces) < len(self.stored.spaces):
            for stored in self.stored.spaces.values():
                self._made(stored)  # also one whose only vector was removed at once
        touched = {(stored.tenant, stored.name): self._made(stored) for stored, *_ in changes.halved}
        for space in touched.values():
            space.adopt()
        for stored, owners, halves, _ in changes.halved:
            self._made(stored).put([owner.entity_id for owner in owners], halves)
        for entity, stored in changes.gone:
            touched[stored.tenant, stored.name] = space = self._made(stored)
            space.remove(entity.entity_id)
        for entity in changes.entities:
            attributes = entity.attributes
            for name in entity.spaces:
                space = self._spaces[entity.tenant, name]
                names = entity.changed | attributes.keys() if name in entity.vectors else entity.changed
                space.describe(entity.entity_id, entity.type, attributes, names)
        for space in touched.values():
            space.maintain(self._submit)

    def _made(self, stored: VectorSpace) -> AnySpace:
        """The space in memory of one in the file."""
        name = stored.tenant, stored.name
        space = self._spaces.get(name)
        if space is None:
            space = self._make_space(stored.number, stored.dimension, stored.metric, stored.index, stored.model)
            self._spaces[name] = space
        return space

    def _holds(self, tenant: str, entity_id: str) -> bool:
        return any(owner == tenant and entity_id in space.rows for (owner, _), space in self._spaces.items())

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
        if space.metric != "cosine" and np.abs(vector).max() > LARGEST_ASKED:
            raise BadRequest(f"the vector has a number beyond {LARGEST_ASKED:.0e}")
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
        entities = self.stored.read.stored(query.tenant, entity_ids)
        hits = []
        for entity_id, score in zip(entity_ids, scores, strict=True):
            entity = entities[entity_id]  # a row in memory is an entity in the file
            attributes = vector = None
            if query.output_fields:
                held = entity.attributes
                attributes = {name: held[name] for name in query.output_fields if name in held}
            if query.include_vectors:
                vector = self.stored.read.vector(self.stored.spaces[query.tenant, query.space], entity.number)
            hits.append(Hit(entity_id=entity_id, score=score, attributes=attributes, vector=vector))
        return hits

    def vectors_of(self, tenant: str, entity_id: str) -> dict[str, Vector]:
        """An entity's vectors by space, float32 to the precision of fp16; none for a stranger."""
        return self.stored.read.vectors_of(tenant, entity_id)

    def count(self) -> int:
        """How many vectors there are."""
        return sum(len(space.rows) for space in self._spaces.values())

    def digest(self) -> str:
        return self.stored.digest()

    def digests(self) -> Digests:
        """A hash of what is kept, by partition."""
        return self.stored.read.digests()

    # ── the index in memory ─────────────────────────────────────────────────────────────────────────────────

    def wait_until_built(self) -> None:
        """Wait for the indices under construction, and search with them from now on."""
        wait([space.build for space in self._spaces.values() if space.build])
        for space in self._spaces.values():
            space.adopt()

    def _load(self, stored: VectorSpace, space: AnySpace) -> None:
        space.reserve(self.stored.read.count(stored))
        for some in self.stored.read.shown_in(stored):
            halves = np.frombuffer(b"".join(half for *_, half in some), HALF)
            space.put([entity_id for entity_id, *_ in some], halves.reshape(len(some), -1))
            for entity_id, kind, attributes, _ in some:
                space.describe(entity_id, kind, attributes, attributes)

    def _submit(self, build: Callable[[Callable[[], bool]], Any]) -> Future[Any]:
        return self._builder.submit(build, self._closing.is_set)


def _give_way() -> None:
    """Let every other thread of the machine go first, where threads have a priority of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
