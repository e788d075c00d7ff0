"""One vector space in memory: fp16 rows, their entities and attributes, and exact or graph search over them.

Rows `0 … m-1` lie in the graph (once there is one), rows `m … n-1` in a flat tail. A row of the tail is
overwritten in place when its entity's vector is replaced; a row that a graph covers is marked dead, and the
new vector goes to the tail. The graph is built on another thread from a copy, and swapped in by `adopt`.
Everything else runs on the thread that owns the store. Knows no events and no SQLite; looks at `columns`,
`halves`, `matrix_scan` and the SDK.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from memory_shards.stores.columns import Columns, Condition, Rows, grown
from memory_shards.stores.halves import Halves
from memory_shards.stores.matrix_scan import MATRIX_FROM, MatrixScan
from mnemesh.messages import IndexKind, Metric

_log = logging.getLogger(__name__)

GRAPH_FROM: dict[IndexKind, float] = {"auto": 16_384, "hnsw": 1_024, "flat": float("inf")}
"""How many rows make a graph worth building. 16,384 x 384 scan flat in 0.3 ms."""

LEAST_TAIL, TAIL_SHARE = 1_024, 1 / 8
"""How many rows, in all and beside the graph's, may wait outside of it: every search scans them flat."""

QUIET_S, QUIET_TAIL_SHARE = 1.0, 1 / 64
"""What the share is while nothing is written: to extend a graph copies it, so it is seldom done under load."""

EXACT_SHARE = 0.15
"""Where fewer rows pass a filter, they are gathered and scanned: 15 µs for 365 of 100,000 x 96 and 150 µs
for 2,000 of 20,000 x 384. A bitmap over all rows takes 270 and 120 µs, and a filtered graph loses recall."""

RETRY_S = 60.0
"""How long a space whose graph could not be built (for want of memory, say) is left without one."""

DEAD_SHARE = 0.25
LEAST_DEAD = 256

# Measured on 20,000 x 384 of 32 latent dimensions: recall@10 0.988 in 0.215 ms a query; 16 links take 0.275 ms for
# as much, and 8-bit codes 0.16 ms for 0.982.
LINKS, EF_CONSTRUCTION, EF_SEARCH = 32, 80, 64
_BUILD_STEP = 1_024

_FAISS: Any = faiss  # its type stubs lack these signatures
_QT_FP16 = faiss.ScalarQuantizer.QT_fp16
_METRICS = {"cosine": faiss.METRIC_INNER_PRODUCT, "ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}

Codes = NDArray[np.uint8]
Bits = NDArray[np.uint8]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""(q, k) scores, larger is better, and (q, k) rows, best first; row -1 where there was no more."""


class _Build(NamedTuple):
    """A graph under construction over the old rows `order`, begun when there were `size` rows."""

    order: Rows
    size: int
    graph: Future[Any]


class Space:
    """The rows of one (tenant, space). `number` is its key in the store's file."""

    def __init__(self, number: int, dimension: int, metric: Metric, index: IndexKind, model: str | None) -> None:
        self.number = number
        self.dimension = dimension
        self.metric: Metric = metric
        self.index: IndexKind = index
        self.model = model
        self.rows: dict[str, int] = {}
        self._entity_ids: list[str] = []
        self._live = np.zeros(0, np.bool_)
        self._columns = Columns()
        self._tail = self._flat()
        self._matrix_scan = MatrixScan(dimension, _METRICS[metric])
        self._graph: Any = None
        self._build: _Build | None = None
        self._written_at = 0.0
        self._failed_at = -RETRY_S

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def reserve(self, count: int) -> None:
        """Have room for so many rows in all, of a space that has none: growing to there would hold up to twice that."""
        self._tail.codes.resize(count * self._tail.code_size)
        self._tail.codes.resize(0)

    def put(self, entity_ids: Sequence[str], halves: Halves) -> None:
        """Add the vectors of distinct entities, or replace those that they had."""
        self._written_at = monotonic()
        codes = halves.view(np.uint8)
        appended = []
        covered = max(self._graph_size, self._build.size if self._build else 0)
        for position, entity_id in enumerate(entity_ids):
            row = self.rows.get(entity_id)
            if row is not None and row >= covered:
                _codes(self._tail)[row - self._graph_size] = codes[position]
                continue
            if row is not None:
                self._live[row] = False
            self.rows[entity_id] = len(self._entity_ids)
            self._entity_ids.append(entity_id)
            appended.append(position)
        size = len(self._entity_ids)
        self._live = grown(self._live, size)
        self._live[size - len(appended) : size] = True
        if appended:
            self._tail.add_sa_codes(np.ascontiguousarray(codes[appended]))

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

    # ── searching ───────────────────────────────────────────────────────────────────────────────────────────

    def select(self, kind: str | None, conditions: Sequence[Condition]) -> Rows:
        """The rows that a filter lets pass."""
        return self._columns.select(self._live[: len(self._entity_ids)], kind, conditions)

    def search(self, vectors: NDArray[np.float32], k: int, passing: Rows | None = None) -> Found:
        """The `k` best of all live rows, or of `passing` (from `select`), for each of (q, d) vectors.

        Never fewer than `k` unless fewer rows pass.
        """
        size = len(self._entity_ids)
        available = len(self.rows) if passing is None else len(passing)
        k = min(k, available)
        if k < 1:
            return np.zeros((len(vectors), 0), np.float32), np.zeros((len(vectors), 0), np.int64)
        if self.metric == "cosine":
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        if passing is not None and available < EXACT_SHARE * size:
            return self._search_few(vectors, k, passing)
        mask = self._mask(passing)
        tail = self._search_tail(vectors, k, mask)
        if self._graph is None:
            return tail
        effort = max(EF_SEARCH, 2 * k) * (1 if passing is None else 2)
        found = self._merge(self._search_graph(vectors, k, mask, effort), tail, k)
        if (found[1] < 0).any():
            found = self._merge(self._search_graph(vectors, k, mask, None), tail, k)
        return found

    def entity_at(self, row: int) -> str:
        """The entity of a row."""
        return self._entity_ids[row]

    def _search_few(self, vectors: NDArray[np.float32], k: int, rows: Rows) -> Found:
        few = self._flat()
        few.add_sa_codes(self._gather(rows))
        scores, positions = self._scored(few.search(vectors, k))
        return scores, rows[positions]

    def _search_tail(self, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None) -> Found:
        if mask is not None:
            mask = mask[self._graph_size :]
        if len(vectors) >= MATRIX_FROM:
            found = self._matrix_scan.search(_codes(self._tail), vectors, k, mask)
        else:
            found = _search(self._tail, vectors, k, mask, faiss.SearchParameters())
        scores, rows = self._scored(found)
        return scores, np.where(rows < 0, rows, rows + self._graph_size)

    def _search_graph(
        self, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None, effort: int | None
    ) -> Found:
        """Along the graph with this `efSearch`, or every row of it where `effort` is `None`."""
        if mask is not None:
            mask = mask[: self._graph_size]
        if effort is None:
            storage = faiss.downcast_index(self._graph.storage)
            return self._scored(_search(storage, vectors, k, mask, faiss.SearchParameters()))
        parameters = _FAISS.SearchParametersHNSW(efSearch=effort)
        return self._scored(_search(self._graph, vectors, k, mask, parameters))

    def _merge(self, one: Found, other: Found, k: int) -> Found:
        scores = np.concatenate((one[0], other[0]), axis=1)
        rows = np.concatenate((one[1], other[1]), axis=1)
        scores[rows < 0] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def _scored(self, found: Found) -> Found:
        return (-found[0], found[1]) if self.metric == "l2" else found

    def _mask(self, passing: Rows | None) -> NDArray[np.bool_] | None:
        """Which rows may be found; `None` for all."""
        size = len(self._entity_ids)
        if passing is None:
            return None if len(self.rows) == size else self._live[:size]
        mask = np.zeros(size, np.bool_)
        mask[passing] = True
        return mask

    # ── keeping the index in shape ──────────────────────────────────────────────────────────────────────────

    @property
    def build(self) -> Future[Any] | None:
        """The graph under construction, if one is."""
        return self._build.graph if self._build else None

    def maintain(self, submit: Callable[[Callable[[Callable[[], bool]], Any]], Future[Any]]) -> None:
        """Drop the dead rows when they are many, and have a graph built when the tail is long.

        `submit` runs a function on the builder's thread; the function asks its argument whether to stop.
        """
        if self._build or monotonic() - self._failed_at < RETRY_S:
            return
        size, alive = len(self._entity_ids), len(self.rows)
        crowded = size - alive > max(LEAST_DEAD, DEAD_SHARE * size)
        if not crowded and size - self._graph_size < self._longest_tail():
            return
        live = np.flatnonzero(self._live[:size])
        if crowded and (self._graph is None or alive < GRAPH_FROM[self.index]):
            self._renumber(live, None)
        else:
            # Without many dead rows the graph is only extended: what it has keeps its rows.
            base = None if crowded else self._graph
            kept = 0 if base is None else self._graph_size
            added = live[live >= kept]
            codes = self._gather(added)
            graph = submit(lambda stopped: self._built(base, codes, stopped))
            self._build = _Build(np.append(np.arange(kept), added), size, graph)

    def _longest_tail(self) -> float:
        if self._graph is None:
            return GRAPH_FROM[self.index]
        share = QUIET_TAIL_SHARE if monotonic() - self._written_at > QUIET_S else TAIL_SHARE
        return max(LEAST_TAIL, self._graph_size * share)

    def adopt(self) -> None:
        """Swap in the graph whose construction is over."""
        if self._build is None or not self._build.graph.done():
            return
        build, self._build = self._build, None
        if error := build.graph.exception():
            self._failed_at = monotonic()
            _log.error("a graph could not be built; the space is searched without", exc_info=error)
            return
        graph = build.graph.result()
        self._renumber(np.append(build.order, np.arange(build.size, len(self._entity_ids))), graph)

    def _built(self, base: Any, codes: Codes, stopped: Callable[[], bool]) -> Any:
        """On the builder's thread: a copy of `base`, or a new graph, with the codes added."""
        faiss.omp_set_num_threads(1)
        if base is None:
            graph = _FAISS.IndexHNSWSQ(self.dimension, _QT_FP16, LINKS, _METRICS[self.metric])
            graph.hnsw.efConstruction = EF_CONSTRUCTION
        else:
            graph = faiss.clone_index(base)
        for start in range(0, len(codes), _BUILD_STEP):
            if stopped():
                raise InterruptedError("the store is closing")
            graph.add(codes[start : start + _BUILD_STEP].view(np.float16).astype(np.float32))
        return graph

    def _renumber(self, order: Rows, graph: Any) -> None:
        """New row i is old row `order[i]`; the first of them lie in `graph`, the others become the tail."""
        tail = self._flat()
        rest = order[graph.ntotal if graph else 0 :]
        if len(rest):
            tail.add_sa_codes(self._gather(rest))
        self._tail, self._graph = tail, graph
        self._live = self._live[order]
        self._entity_ids = [self._entity_ids[row] for row in order.tolist()]
        self.rows = {self._entity_ids[row]: row for row in np.flatnonzero(self._live).tolist()}
        self._columns.take(order)

    @property
    def _graph_size(self) -> int:
        return int(self._graph.ntotal) if self._graph else 0

    def _flat(self) -> Any:
        return faiss.IndexScalarQuantizer(self.dimension, _QT_FP16, _METRICS[self.metric])

    def _gather(self, rows: Rows) -> Codes:
        """A copy of the codes of ascending rows."""
        if self._graph is None:
            return _codes(self._tail).take(rows, axis=0)
        split = np.searchsorted(rows, self._graph_size)
        return np.concatenate(
            (
                _codes(faiss.downcast_index(self._graph.storage)).take(rows[:split], axis=0),
                _codes(self._tail).take(rows[split:] - self._graph_size, axis=0),
            )
        )


def _codes(flat: Any) -> Codes:
    """A flat index's own memory, without a copy: valid until the index grows."""
    if not flat.ntotal:
        return np.zeros((0, flat.code_size), np.uint8)
    memory: Codes = faiss.rev_swig_ptr(flat.codes.data(), flat.codes.size())
    return memory.reshape(flat.ntotal, flat.code_size)


def _search(index: Any, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None, parameters: Any) -> Found:
    """Let FAISS search the rows in `mask` (all if `None`)."""
    bits: Bits | None = None if mask is None else np.packbits(mask, bitorder="little")
    if bits is not None:
        parameters.sel = faiss.IDSelectorBitmap(index.ntotal, faiss.swig_ptr(bits))
    found: Found = index.search(np.ascontiguousarray(vectors), k, params=parameters)
    return found
