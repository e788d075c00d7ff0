"""The embedded stores as a shard reads them: each read where it may take as long as it does.

Short reads of the documents run on the event loop, at some 14 µs each; long ones on a thread of their own, on another
connection, so that neither the loop nor `apply` waits for them, nor they for those. Vectors belong to the thread of
their projection, and searches go there together. Looks at `sqlite`, `memory_vectors`, `memory_shards.projection` and
`mnemesh`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from memory_shards.batcher import Batcher
from memory_shards.merge import Document
from memory_shards.projection import Projection
from memory_shards.stores import Counted, Edge, Searched, VectorQuery, Walk
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.ids import partition_of
from mnemesh.messages import Description, Direction, Hit, Left, ListedEntity, Suspect, TimelineEvent
from mnemesh.wire import Vector

Result = TypeVar("Result")

MOST_DOCUMENTS_APPLIED = 4000
"""Records in one transaction of the documents where they lag: no read waits for it, and pages that many events touch
are written once."""

MOST_VECTORS_APPLIED = 250
"""Records in one transaction of the vector store: about 8 ms of its worker, which searches wait for."""

MOST_IDS_ON_LOOP = 200
MOST_EDGES_ON_LOOP = 1000
"""A walk that is wider goes to the scanning thread: at 2 µs an edge it would hold up the loop."""


class EmbeddedMemory:
    """Documents, edges and texts, or some of them, from one SQLite file. Belongs to the event loop."""

    def __init__(self, name: str, store: SqliteStore, partitions: frozenset[int]) -> None:
        self.projection = Projection(name, store, most=MOST_DOCUMENTS_APPLIED)
        self.store = store
        self._partitions = partitions
        self._scanned = store.reader()
        self._scanner = ThreadPoolExecutor(1, thread_name_prefix=f"scan-{name}")

    @property
    def quarantined(self) -> Mapping[str, int]:
        return self.store.quarantined

    @property
    def rejected(self) -> int:
        return self.store.rejected

    async def close(self) -> None:
        await self._scan(self._scanned.close)
        self._scanner.shutdown(wait=True)
        await self.projection.close()

    async def _scan(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._scanner, work, *arguments)

    async def counted(self, *, digest: bool) -> Counted:
        projection = self.projection
        if not digest:
            at = projection.stands_at
            return Counted(*await self._scan(self._scanned.counts), at)
        return await projection.on_worker(self._digested)

    def _digested(self) -> Counted:
        """On the worker, so that all of it is of one moment; the loop and the scanner have readers of their own."""
        with closing(self.store.reader()) as reader:
            return Counted(*reader.counts(), self.projection.stands_at, self.store.digests())

    # ── documents ───────────────────────────────────────────────────────────────────────────────────────────

    async def get(
        self, tenant: str, entity_id: str, as_of_ms: int | None = None, valid_at_ms: int | None = None
    ) -> Document | None:
        return self.store.get(tenant, entity_id, as_of_ms, valid_at_ms)

    async def suspects(self, tenant: str, entity_id: str) -> list[Suspect]:
        return await self._scan(self._scanned.suspects, tenant, entity_id)

    async def timeline(self, tenant: str, entity_id: str, after: int, limit: int) -> list[TimelineEvent]:
        return self.store.timeline(tenant, entity_id, after, limit)

    async def timeline_range(
        self, tenant: str, start_ms: int | None, end_ms: int | None, type: str | None, after: int, limit: int
    ) -> list[TimelineEvent]:
        return await self._scan(self._scanned.timeline_range, tenant, start_ms, end_ms, type, after, limit)

    async def list_entities(
        self, tenant: str, after: str, limit: int, *, types: Sequence[str] = (), held: bool, with_sites: bool
    ) -> list[ListedEntity]:
        return await self._scan(
            lambda: self._scanned.list_entities(tenant, after, limit, types=types, held=held, with_sites=with_sites)
        )

    async def describe(self, tenant: str, entity_ids: Sequence[str]) -> list[Description]:
        return await self._scan(self._scanned.describe, tenant, entity_ids)

    async def erased(
        self, tenant: str, entity_id: str, sequences: Sequence[int]
    ) -> tuple[list[int], list[int], list[Left]]:
        return await self._scan(self._scanned.erased, tenant, entity_id, sequences)

    async def forgotten(self, sequences: Sequence[int]) -> list[int]:
        return await self._scan(self._scanned.forgotten, sequences)

    async def held(self) -> tuple[int, int]:
        return await self._scan(self._scanned.held)

    # ── texts ───────────────────────────────────────────────────────────────────────────────────────────────

    async def search_text(self, tenant: str, query: str, k: int, type: str | None) -> tuple[list[Hit], int]:
        return await self._scan(self._search_text, tenant, query, k, type)

    def _search_text(self, tenant: str, query: str, k: int, type: str | None) -> tuple[list[Hit], int]:
        return self._scanned.search_text(tenant, query, k, type), self._scanned.stands_at()

    # ── edges ───────────────────────────────────────────────────────────────────────────────────────────────

    async def edges_of(self, tenant: str, entity_id: str) -> tuple[list[Edge], int]:
        return self.store.edges_of(tenant, entity_id), self.store.stands_at()

    async def expand(
        self,
        tenant: str,
        entity_ids: Sequence[str],
        relations: Sequence[str],
        direction: Direction,
        limit: int,
        ahead: int = 0,
    ) -> Walk:
        narrow = len(entity_ids) <= MOST_IDS_ON_LOOP
        asked = tenant, entity_ids, relations, direction
        if narrow:
            edges, truncated = self.store.expand(*asked, min(limit, MOST_EDGES_ON_LOOP))
            if not truncated or limit <= MOST_EDGES_ON_LOOP:
                room = min(limit, MOST_EDGES_ON_LOOP)
                reached = self._walk_ahead(
                    tenant, entity_ids, relations, edges, room, ahead if direction == "out" else 0
                )
                return Walk(edges, truncated, reached, self.store.stands_at())
        return await self._scan(self._expand, *asked, limit)

    def _expand(
        self, tenant: str, entity_ids: Sequence[str], relations: Sequence[str], direction: Direction, limit: int
    ) -> Walk:
        edges, truncated = self._scanned.expand(tenant, entity_ids, relations, direction, limit)
        return Walk(edges, truncated, [], self._scanned.stands_at())

    def _walk_ahead(
        self,
        tenant: str,
        entity_ids: Sequence[str],
        relations: Sequence[str],
        edges: list[tuple[str, str, str]],
        most: int,
        hops: int,
    ) -> list[str]:
        """Add to `edges` those of the entities that they lead to and that are ours; returns these entities."""
        ahead: list[str] = []
        known = set(entity_ids)
        reached = edges
        for _ in range(hops):
            frontier = [
                target
                for target in dict.fromkeys(far for _, _, far in reached)
                if target not in known and partition_of(tenant, target) in self._partitions
            ]
            if not 0 < len(frontier) <= MOST_IDS_ON_LOOP:
                break
            reached, truncated = self.store.expand(tenant, frontier, relations, "out", most - len(edges))
            if truncated:
                break
            edges += reached
            ahead += frontier
            known.update(frontier)
        return ahead


class EmbeddedVectors:
    """Vectors that FAISS searches in this process. Belongs to the event loop; `run` answers its searches, for ever."""

    def __init__(self, name: str, store: MemoryVectors) -> None:
        self.projection = Projection(name, store, most=MOST_VECTORS_APPLIED)
        self.store = store
        self._searches: Batcher[VectorQuery, Searched] = Batcher(self._search)

    async def run(self) -> None:
        await self._searches.run()

    async def close(self) -> None:
        await self.projection.close()

    async def counted(self, *, digest: bool) -> Counted:
        return await self.projection.on_worker(self._counted, digest)

    def _counted(self, digest: bool) -> Counted:
        at = self.projection.stands_at
        return Counted(self.store.count(), 0, at, {"vectors": self.store.digests()} if digest else {})

    async def search(self, query: VectorQuery) -> Searched:
        return await self._searches.ask(query)

    async def _search(self, queries: Sequence[VectorQuery]) -> Sequence[Searched | Exception]:
        return await self.projection.on_worker(self._searched, queries)

    def _searched(self, queries: Sequence[VectorQuery]) -> list[Searched | Exception]:
        """The answers, and where the store stands: what waited for it may see more than it asked for."""
        at = self.projection.stands_at
        answers = self.store.search(queries)
        return [answer if isinstance(answer, Exception) else Searched(answer, at, at) for answer in answers]

    async def vectors_of(self, tenant: str, entity_id: str) -> tuple[dict[str, Vector], int]:
        return await self.projection.on_worker(self._vectors_of, tenant, entity_id)

    def _vectors_of(self, tenant: str, entity_id: str) -> tuple[dict[str, Vector], int]:
        at = self.projection.stands_at
        return self.store.vectors_of(tenant, entity_id), at
