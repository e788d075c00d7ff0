"""The searches of the store `milvus:`, on a thread: in Milvus, and what it does not hold from the file of vectors.

A search sees all up to the watermark that the reply tells: Milvus is told from when on it has to be as new
(`guarantee_timestamp`), which costs nothing once that is past. What passes a filter there is checked against the file.
Looks at `milvus_store`, `milvus_rows`, `columns`, `memory_shards.outside` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from pymilvus import MilvusClient, MilvusException

from memory_shards.batcher import Batcher
from memory_shards.breaker import ANSWER_S
from memory_shards.digests import Digests
from memory_shards.outside import OutsideProjection
from memory_shards.projection import Projection
from memory_shards.stores import Counted, Searched, VectorQuery, milvus_client
from memory_shards.stores.columns import Columns, Condition, parse_filter
from memory_shards.stores.milvus_rows import COLUMNS, expression, facts_of
from memory_shards.stores.milvus_store import MilvusStore
from memory_shards.stores.vector_file import VectorFile
from memory_shards.stores.vector_reader import VectorSpace
from mnemesh import wire
from mnemesh.errors import BadRequest, MnemeshError, NotFound, Unavailable
from mnemesh.messages import Hit
from mnemesh.wire import Vector

Result = TypeVar("Result")

MOST_APPLIED = 1_000
"""Records in one go."""

MOST_HITS = 16_384
"""Milvus gives no more."""

FIRST_MORE = 64
ROWS_A_PAGE = 500


class MilvusVectors:
    """Vectors in Milvus. Belongs to the event loop; `run` answers its searches, for ever.

    `file` is the projection of what every replica keeps of them itself, which Milvus is written from.
    """

    def __init__(self, store: MilvusStore, file: Projection, stored: VectorFile) -> None:
        self.projection = OutsideProjection("vectors", store, most=MOST_APPLIED)
        self.file = file
        self.store = store
        self.stored = stored
        self._read = stored.reader()
        self._client: MilvusClient | None = None
        self._loaded: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search-milvus")
        self._searches: Batcher[VectorQuery, Searched] = Batcher(self._search)

    async def run(self) -> None:
        await self._searches.run()

    async def close(self) -> None:
        await self._on_thread(self._close)
        self._thread.shutdown()
        await self.projection.close()

    def _close(self) -> None:
        self._read.close()
        if self._client is not None:
            milvus_client.close(self._client, self.store.target)

    async def _on_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def counted(self, *, digest: bool) -> Counted:
        """What the file says; with `digest` also what Milvus has of it, as long as nothing is written there."""
        counted = await self.file.on_worker(self._counted, digest)
        if not digest:
            return counted
        index = await self.projection.on_worker(self._of_index)
        return counted._replace(digests={**counted.digests, "index": index})

    def _counted(self, digest: bool) -> Counted:
        at = self.file.stands_at
        return Counted(self.stored.read.count(), 0, at, {"vectors": self.stored.read.digests()} if digest else {})

    def _of_index(self) -> Digests:
        """The rows in Milvus. On the projection's worker, so that this replica writes none meanwhile."""
        digests = Digests(self.projection.stands_at)
        with milvus_client.connected(self.store.target) as client:
            for space in list(self.stored.spaces.values()):
                collection = milvus_client.collection_of(self.store.shard, space.tenant, space.name)
                if not milvus_client.is_loaded(client, collection):
                    continue
                rows = client.query_iterator(collection, ROWS_A_PAGE, output_fields=list(COLUMNS), **self._level)
                while page := rows.next():
                    for row in page:
                        digests.add(space.tenant, row["id"], facts_of(space, row))
                rows.close()
        return digests

    async def vectors_of(self, tenant: str, entity_id: str) -> tuple[dict[str, Vector], int]:
        return await self.file.on_worker(self._vectors_of, tenant, entity_id)

    def _vectors_of(self, tenant: str, entity_id: str) -> tuple[dict[str, Vector], int]:
        return self.stored.read.vectors_of(tenant, entity_id), self.file.stands_at

    # ── searching ───────────────────────────────────────────────────────────────────────────────────────────

    async def search(self, query: VectorQuery) -> Searched:
        return await self._searches.ask(query)

    async def _search(self, queries: Sequence[VectorQuery]) -> Sequence[Searched | Exception]:
        return await self.projection.read(lambda: self._on_thread(self._searched, queries))

    def _searched(self, queries: Sequence[VectorQuery]) -> list[Searched | Exception]:
        """The answers in order. Queries of one space without a filter share one call."""
        at = self.projection.stands_at
        answers: dict[int, list[Hit] | MnemeshError] = {}
        together: dict[VectorSpace, list[int]] = defaultdict(list)
        for position, query in enumerate(queries):
            try:
                space, conditions = self._planned(query)
            except MnemeshError as error:
                answers[position] = error
                continue
            if not conditions and query.type is None:
                together[space].append(position)
                continue
            try:
                answers[position] = self._filtered(space, query, conditions)
            except MnemeshError as error:
                answers[position] = error
        for space, positions in together.items():
            asked = [queries[position] for position in positions]
            try:
                found = self._asked(space, [query.vector for query in asked], max(query.k for query in asked), "")
            except MnemeshError as error:
                answers |= dict.fromkeys(positions, error)
                continue
            for position, query, hits in zip(positions, asked, found, strict=True):
                answers[position] = self._hits(space, query, hits[: query.k])
        latest = max(at, self.file.stands_at, self.projection.stands_at)
        return [
            answer if isinstance(answer, MnemeshError) else Searched(answer, at, latest)
            for answer in (answers[position] for position in range(len(queries)))
        ]

    def _planned(self, query: VectorQuery) -> tuple[VectorSpace, list[Condition]]:
        space = self.stored.spaces.get((query.tenant, query.space))
        if space is None:
            raise NotFound(f"no vector space {query.space!r}")
        vector = wire.as_vector(query.vector)
        if len(vector) != space.dimension:
            raise BadRequest(f"the vector has {len(vector)} dimensions, space {query.space!r} has {space.dimension}")
        return space, parse_filter(query.filter)

    def _filtered(
        self, space: VectorSpace, query: VectorQuery, conditions: Sequence[Condition]
    ) -> list[Hit] | MnemeshError:
        """The hits that pass, which may take more than Milvus was asked for at first."""
        passing = expression(query.type, conditions)
        asked = query.k
        while True:
            (hits,) = self._asked(space, [query.vector], asked, passing)
            right = self._meeting(query, conditions, [entity_id for entity_id, _ in hits])
            passed = [hit for hit in hits if hit[0] in right]
            if len(passed) >= query.k or len(hits) < asked:
                return self._hits(space, query, passed[: query.k])
            if asked == MOST_HITS:
                return BadRequest(f"too many of the nearest {MOST_HITS} do not pass this filter: make it narrower")
            asked = min(MOST_HITS, max(FIRST_MORE, 4 * asked))

    def _meeting(self, query: VectorQuery, conditions: Sequence[Condition], entity_ids: list[str]) -> set[str]:
        """Those of some entities that meet a filter, by what the file knows of them."""
        stored = self._read.stored(query.tenant, entity_ids)
        known = [entity for entity in stored.values() if query.space in entity.spaces]
        columns = Columns()
        for row, entity in enumerate(known):
            attributes = entity.attributes
            columns.describe(row, entity.type, attributes, attributes)
        rows = columns.select(np.ones(len(known), np.bool_), query.type, conditions)
        return {known[row].entity_id for row in rows.tolist()}

    def _asked(
        self, space: VectorSpace, vectors: Sequence[Vector], k: int, passing: str
    ) -> list[list[tuple[str, float]]]:
        """For each of (d,) vectors the nearest: entities and scores, larger is better."""
        collection = milvus_client.collection_of(self.store.shard, space.tenant, space.name)
        if collection not in self._loaded:
            if not milvus_client.is_loaded(self._connected, collection):
                if self._read.count(space):
                    raise Unavailable(f"the vectors of {space.name!r} are not in Milvus yet", retry_after_ms=500)
                return [[] for _ in vectors]
            self._loaded.add(collection)
        given = [wire.as_vector(vector) for vector in vectors]
        if padding := milvus_client.padded(space.dimension) - space.dimension:
            given = [np.pad(vector, (0, padding)) for vector in given]
        try:
            found = self._connected.search(
                collection,
                given,
                filter=passing,
                limit=k,
                timeout=ANSWER_S,
                **self._level,
            )
        except MilvusException:
            self._loaded.discard(collection)  # it may be gone
            raise
        sign = -1.0 if space.metric == "l2" else 1.0
        return [[(hit["id"], _score(sign * hit["distance"])) for hit in hits] for hits in found]

    @property
    def _connected(self) -> MilvusClient:
        if self._client is None:
            self._client = milvus_client.connect(self.store.target)
        return self._client

    @property
    def _level(self) -> dict[str, Any]:
        """How new a search has to be: as new as what is told of the store."""
        if self.store.target.is_file:
            return {}
        if not self.store.visible_from:
            return {"consistency_level": "Strong"}
        return {"consistency_level": "Customized", "guarantee_timestamp": self.store.visible_from}

    def _hits(self, space: VectorSpace, query: VectorQuery, found: Sequence[tuple[str, float]]) -> list[Hit]:
        if not query.output_fields and not query.include_vectors:
            return [Hit(entity_id=entity_id, score=score) for entity_id, score in found]
        stored = self._read.stored(query.tenant, [entity_id for entity_id, _ in found])
        told = []
        for entity_id, score in found:
            entity = stored.get(entity_id)
            vector = None
            if entity is not None and query.space in entity.spaces:
                vector = self._read.vector(space, entity.number)
            if entity is None or vector is None:
                continue  # it was just taken out
            held = entity.attributes
            told.append(
                Hit(
                    entity_id=entity_id,
                    score=score,
                    attributes={name: held[name] for name in query.output_fields if name in held}
                    if query.output_fields
                    else None,
                    vector=vector if query.include_vectors else None,
                )
            )
        return told


def _score(distance: float) -> float:
    """A vector of length zero is like no other."""
    return 0.0 if math.isnan(distance) else distance
