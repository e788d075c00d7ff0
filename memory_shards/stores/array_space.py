"""A vector space on an accelerator: fp16 rows in its memory, searched exactly, chunk by chunk.

    queries by chunk of rows (one matrix product) → best of each chunk → those that matter once more, exactly

Cosine spaces take the product in fp16, and in fp32 for queries that more lie close to than are looked at again.

Where an array lives is its library's business: CuPy or PyTorch, whichever the machine has (Jetson images ship them),
through the array API; the same code runs on NumPy. The rows' entities and attributes stay on the host. A row that is
given up is taken by the next vector. Knows no events and no SQLite; looks at `columns`, `accelerator` and the SDK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_shards.stores.accelerator import Accelerator
from memory_shards.stores.columns import Columns, Condition, Rows, grown
from memory_shards.stores.flat import Found
from memory_shards.stores.halves import Halves, units
from mnemesh.messages import IndexKind, Metric

LEAST_ROWS = 1_024
CHUNK_SCORES = 128 << 20
"""Scores of one product: so many rows at once that the queries' scores take this many numbers."""

CHUNK_NUMBERS = 64 << 20
"""Numbers of rows at once, where they are copied: gathered by a filter, or widened to fp32."""

SPARE = 32
"""Candidates beyond twice `k` that are scored again."""

FP16_ERROR = 4e-3
"""How far apart scores of unit vectors are in fp16 and fp32, at most."""


class ArraySpace:
    """The rows of one (tenant, space) on an accelerator. Belongs to the thread that owns the store."""

    def __init__(
        self,
        accelerator: Accelerator,
        number: int,
        dimension: int,
        metric: Metric,
        index: IndexKind,
        model: str | None,
    ) -> None:
        self.number = number
        self.dimension = dimension
        self.metric: Metric = metric
        self.index: IndexKind = index
        self.model = model
        self.rows: dict[str, int] = {}
        self._on = accelerator
        self._entity_ids: list[str] = []
        self._free: list[int] = []
        self._dead: Rows | None = None
        self._live = np.zeros(0, np.bool_)
        self._columns = Columns()
        self._halves = accelerator.zeros((LEAST_ROWS, dimension))

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def reserve(self, count: int) -> None:
        """Have room for so many rows in all, of a space that has none."""
        if count > len(self._halves):
            self._halves = self._on.zeros((count, self.dimension))

    def put(self, entity_ids: Sequence[str], halves: Halves) -> None:
        """Add the vectors of distinct entities, or replace those that they had."""
        rows = np.array([self._row(entity_id) for entity_id in entity_ids], np.intp)
        size = len(self._entity_ids)
        self._live = grown(self._live, size)
        self._live[rows] = True
        if size > len(self._halves):
            larger = self._on.zeros((max(size, 2 * len(self._halves)), self.dimension))
            larger[: len(self._halves)] = self._halves
            self._halves = larger
        self._halves[self._on.indices(rows)] = self._on.array(halves)

    def _row(self, entity_id: str) -> int:
        row = self.rows.get(entity_id)
        if row is None:
            if self._free:
                row, self._dead = self._free.pop(), None
            else:
                row = len(self._entity_ids)
                self._entity_ids.append(entity_id)
            self._entity_ids[row] = entity_id
            self.rows[entity_id] = row
        return row

    def describe(
        self, entity_id: str, kind: str | None, attributes: Mapping[str, object], names: Iterable[str]
    ) -> None:
        """Set an entity's type and those of its attributes that are in `names`; absent ones are cleared."""
        self._columns.describe(self.rows[entity_id], kind, attributes, names)

    def remove(self, entity_id: str) -> None:
        """Forget an entity's vector, if it has one here."""
        row = self.rows.pop(entity_id, None)
        if row is not None:
            self._live[row] = False
            self._columns.clear(row)
            self._halves[row] = 0
            self._free.append(row)
            self._dead = None

    # ── searching ───────────────────────────────────────────────────────────────────────────────────────────

    def select(self, kind: str | None, conditions: Sequence[Condition]) -> Rows:
        """The rows that a filter lets pass."""
        return self._columns.select(self._live[: len(self._entity_ids)], kind, conditions)

    def search(self, vectors: NDArray[np.float32], k: int, passing: Rows | None = None) -> Found:
        """The `k` best of all live rows, or of `passing` (from `select`), for each of (q, d) vectors."""
        available = len(self.rows) if passing is None else len(passing)
        k = min(k, available)
        if k < 1:
            return np.zeros((len(vectors), 0), np.float32), np.zeros((len(vectors), 0), np.int64)
        if self.metric == "cosine":
            vectors = units(vectors)
        most = min(2 * k + SPARE, available)
        by_halves = self.metric == "cosine"  # only unit vectors are sure to stay within fp16 as products
        scores, rows, least = self._nearest(vectors, k, most, passing, by_halves)
        if by_halves and most < available:
            unsure = np.flatnonzero(least >= scores[:, -1] - FP16_ERROR)
            if len(unsure):  # as many lie close together
                scores[unsure], rows[unsure], _ = self._nearest(vectors[unsure], k, most, passing, False)
        return scores, rows

    def entity_at(self, row: int) -> str:
        """The entity of a row."""
        return self._entity_ids[row]

    def _nearest(
        self, vectors: NDArray[np.float32], k: int, most: int, passing: Rows | None, halves: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """The (q, k) exact scores and rows of the best of `most` candidates, and (q,) the least of their products."""
        queries = self._on.array(vectors)
        rough, places = self._candidates(queries, most, passing, halves)
        rows = self._on.host(places)
        scores = self._exact(queries, places)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        least = self._on.host(rough).min(axis=1).astype(np.float32)
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1), least

    def _candidates(self, queries: Any, most: int, passing: Rows | None, halves: bool) -> tuple[Any, Any]:
        """The best of each chunk, merged: (q, most) products and rows, in no order, on the device."""
        size = len(self._entity_ids) if passing is None else len(passing)
        step = CHUNK_SCORES // len(queries)
        if passing is not None or not halves:  # a chunk is a copy then
            step = min(step, CHUNK_NUMBERS // self.dimension)
        step = max(most, step)
        rows = None if passing is None else self._on.indices(passing)
        centre = self._on.mean(queries)
        parts = []
        for start in range(0, size, step):
            end = min(start + step, size)
            chunk = self._halves[start:end] if rows is None else self._halves[rows[start:end]]
            product = self._products(queries, chunk, centre, halves)
            if rows is None and self._free:
                product[:, self._on.indices(self._dead_between(start, end) - start)] = -np.inf
            scores, places = self._on.best(product, min(most, end - start))
            parts.append((scores, places + start if rows is None else rows[start + places]))
        scores, found = (self._on.side_by_side(part) for part in zip(*parts, strict=True))
        if len(parts) > 1:
            scores, places = self._on.best(scores, most)
            found = self._on.at(found, places)
        return scores, found

    def _dead_between(self, start: int, end: int) -> Rows:
        if self._dead is None:
            self._dead = np.sort(np.array(self._free, np.intp))
        return self._dead[slice(*np.searchsorted(self._dead, (start, end)))]

    def _products(self, queries: Any, chunk: Any, centre: Any, halves: bool) -> Any:
        """(q, n), larger is better: in the order of the scores."""
        if halves:
            return self._on.product_of_halves(queries, chunk)
        wide = self._on.wide(chunk)
        if self.metric != "l2":
            return queries @ wide.T
        wide = wide - centre  # far from there squares would leave nothing of a difference
        return 2 * (queries - centre) @ wide.T - self._on.sums(wide * wide)[None, :]

    def _exact(self, queries: Any, rows: Any) -> NDArray[np.float32]:
        """(q, c) scores of (q, c) rows, in fp32."""
        step = max(1, CHUNK_NUMBERS // (rows.shape[1] * self.dimension))
        parts = []
        for start in range(0, len(queries), step):
            asked = queries[start : start + step][:, None, :]
            chunk = self._on.wide(self._halves[rows[start : start + step]])
            each = -((chunk - asked) ** 2) if self.metric == "l2" else chunk * asked
            parts.append(self._on.host(self._on.sums(each)))
        return np.concatenate(parts)

    # ── what other spaces have to do ────────────────────────────────────────────────────────────────────────

    @property
    def build(self) -> Future[Any] | None:
        return None

    def maintain(self, submit: Callable[[Callable[[Callable[[], bool]], Any]], Future[Any]]) -> None:
        """There is no index to keep in shape."""

    def adopt(self) -> None:
        """There is none to swap in."""

    def close(self) -> None:
        """What the device has goes with this."""
