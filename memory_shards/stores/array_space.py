"""A vector space on an accelerator: fp16 rows in its memory, searched exactly, chunk by chunk.

    queries by chunk of rows (one fp16 matrix product) → best of each chunk → those that matter once more, in fp32

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
from memory_shards.stores.halves import Halves
from mnemesh.messages import IndexKind, Metric

LEAST_ROWS = 1_024
CHUNK_SCORES = 128 << 20
"""Scores of one product: so many rows at once that the queries' scores take this many numbers."""

CHUNK_NUMBERS = 64 << 20
"""Numbers of the rows of one product, where a metric has them widened to fp32."""

SPARE = 32
"""Candidates beyond twice `k` that are scored again."""

FP16_ERROR = 4e-3
"""How far apart scores of unit vectors are in fp16 and fp32, at most: what is so near to the k-th is scored again."""


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
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        queries = self._on.array(vectors)
        most = 2 * k + SPARE
        while True:
            most = min(most, available)
            rough, places = self._candidates(queries, most, passing)
            scores = self._on.host(self._rescored(queries, places))
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            kth = np.take_along_axis(scores, best[:, -1:], 1)
            sure = self._on.host(rough).min(axis=1) < kth[:, 0] - FP16_ERROR
            if most == available or self.metric != "cosine" or sure.all():
                break
            most *= 4  # as many lie close together
        return np.take_along_axis(scores, best, 1), np.take_along_axis(self._on.host(places), best, 1)

    def entity_at(self, row: int) -> str:
        """The entity of a row."""
        return self._entity_ids[row]

    def _candidates(self, queries: Any, most: int, passing: Rows | None) -> tuple[Any, Any]:
        """The best of each chunk, merged: (q, most) scores and rows, in no order, on the device."""
        size = len(self._entity_ids) if passing is None else len(passing)
        step = CHUNK_SCORES // len(queries)
        if self.metric != "cosine":
            step = min(step, CHUNK_NUMBERS // self.dimension)
        step = max(most, step)
        rows = None if passing is None else self._on.indices(passing)
        parts = []
        for start in range(0, size, step):
            end = min(start + step, size)
            product = self._scores(queries, self._halves[start:end] if rows is None else self._halves[rows[start:end]])
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

    def _scores(self, queries: Any, chunk: Any) -> Any:
        """(q, n), larger is better. Only unit vectors are sure to stay within fp16 as products."""
        if self.metric == "cosine":
            return self._on.product(queries, chunk, halves=True)
        product = self._on.product(queries, chunk, halves=False)
        if self.metric == "ip":
            return product
        return 2 * product - self._on.squares(chunk)[None, :]

    def _rescored(self, queries: Any, rows: Any) -> Any:
        """(q, c) exact scores of (q, c) rows, on the device."""
        chunk = self._halves[rows]
        return -self._on.distances(queries, chunk) if self.metric == "l2" else self._on.products(queries, chunk)

    # ── what other spaces have to do ────────────────────────────────────────────────────────────────────────

    @property
    def build(self) -> Future[Any] | None:
        return None

    def maintain(self, submit: Callable[[Callable[[Callable[[], bool]], Any]], Future[Any]]) -> None:
        """There is no index to keep in shape."""

    def adopt(self) -> None:
        """There is none to swap in."""
