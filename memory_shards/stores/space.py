"""One vector space in memory: fp16 rows, their entities and attributes, and how they are searched.

Rows `0 … m-1` lie in the head (once there is one: a graph, or an index on a GPU), rows `m … n-1` in a flat tail. A row
of the tail is overwritten in place when its entity's vector is replaced; a row of the head is marked dead, and the new
vector goes to the tail. A head is built on another thread, and swapped in by `adopt`; one that can grow takes the tail
where it is. Everything else runs on the thread that owns the store. Knows no events and no SQLite; looks at `columns`,
`flat`, `halves`, `hnsw`, `matrix_scan` and the SDK.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from memory_shards.stores.columns import Columns, Condition, Rows, grown
from memory_shards.stores.flat import METRICS, Codes, Found, Mask, codes_of, flat, merged, scored, search
from memory_shards.stores.halves import Halves, units
from memory_shards.stores.hnsw import Hnsw
from memory_shards.stores.matrix_scan import MATRIX_FROM, MatrixScan
from mnemesh.messages import IndexKind, Metric

_log = logging.getLogger(__name__)

LEAST_TAIL, TAIL_SHARE = 1_024, 1 / 8
"""How many rows, in all and beside the head's, may wait outside of it: every search scans them flat."""

QUIET_S, QUIET_TAIL_SHARE = 1.0, 1 / 64
"""What the share is while nothing is written: to extend a graph copies it, so it is seldom done under load."""

EXACT_SHARE = 0.15
"""Where fewer rows pass a filter, they are gathered and scanned: 15 µs for 365 of 100,000 x 96 and 150 µs
for 2,000 of 20,000 x 384. A bitmap over all rows takes 270 and 120 µs, and a filtered graph loses recall."""

RETRY_S = 60.0
"""How long a space whose head has not room for all rows, or could not be built, is left so."""

DEAD_SHARE = 0.25
LEAST_DEAD = 256


class Head(Protocol):
    """What finds the nearest of most rows of a space."""

    worth: ClassVar[dict[IndexKind, float]]
    """How many rows make it worth building."""

    grows: bool
    """Whether it is extended in place, by the thread that owns the store; or a copy of it is, by the builder."""

    def __init__(self, dimension: int, metric: Metric) -> None: ...

    @property
    def size(self) -> int: ...

    @property
    def stored(self) -> Any:
        """The flat index of its rows."""

    def extended(self, codes: Codes, stopped: Callable[[], bool]) -> Head:
        """With these rows added, as many of them as there is memory for.

        Raises `InterruptedError` once it is `stopped`, and another error where it came to nothing.
        """

    def search(self, vectors: NDArray[np.float32], k: int, mask: Mask | None) -> Found:
        """The `k` best of the rows in `mask` (all if `None`) for each vector; row -1 where it did not come by more."""

    def release(self) -> None:
        """Give back what it has. It is not asked again."""


class _Build(NamedTuple):
    """A head under construction over the old rows `order`, begun when there were `size` rows."""

    order: Rows
    size: int
    head: Future[Head]


class Space:
    """The rows of one (tenant, space). `number` is its key in the store's file, `head` what searches most of it."""

    def __init__(
        self,
        number: int,
        dimension: int,
        metric: Metric,
        index: IndexKind,
        model: str | None,
        *,
        head: type[Head] = Hnsw,
    ) -> None:
        self.number = number
        self.dimension = dimension
        self.metric: Metric = metric
        self.index: IndexKind = index
        self.model = model
        self.rows: dict[str, int] = {}
        self._entity_ids: list[str] = []
        self._live = np.zeros(0, np.bool_)
        self._columns = Columns()
        self._tail = flat(dimension, metric)
        self._matrix_scan = MatrixScan(dimension, METRICS[metric])
        self._kind = head
        self._head: Head | None = None
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
        covered = max(self._head_size, self._build.size if self._build else 0)
        for position, entity_id in enumerate(entity_ids):
            row = self.rows.get(entity_id)
            if row is not None and row >= covered:
                codes_of(self._tail)[row - self._head_size] = codes[position]
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
            vectors = units(vectors)
        if passing is not None and available < EXACT_SHARE * size:
            return self._search_few(vectors, k, passing)
        mask = self._mask(passing)
        size = self._head_size
        tail = self._scan(self._tail, vectors, k, mask if mask is None else mask[size:])
        tail = tail[0], np.where(tail[1] < 0, tail[1], tail[1] + size)
        if self._head is None:
            return tail
        return merged(self._search_head(self._head, vectors, k, mask if mask is None else mask[:size]), tail, k)

    def entity_at(self, row: int) -> str:
        """The entity of a row."""
        return self._entity_ids[row]

    def _search_few(self, vectors: NDArray[np.float32], k: int, rows: Rows) -> Found:
        few = flat(self.dimension, self.metric)
        few.add_sa_codes(self._gather(rows))
        scores, positions = search(few, vectors, k, None)
        return scores, rows[positions]

    def _search_head(self, head: Head, vectors: NDArray[np.float32], k: int, mask: Mask | None) -> Found:
        """The rows of the head are scanned for those queries that it came by too few for."""
        k = min(k, head.size if mask is None else int(np.count_nonzero(mask)))
        if not k:
            return np.zeros((len(vectors), 0), np.float32), np.zeros((len(vectors), 0), np.int64)
        scores, rows = head.search(vectors, k, mask)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = self._scan(head.stored, vectors[short], k, mask)
        return scores, rows

    def _scan(self, index: Any, vectors: NDArray[np.float32], k: int, mask: Mask | None) -> Found:
        """All rows of a flat index."""
        if len(vectors) < MATRIX_FROM:
            return search(index, vectors, k, mask)
        return scored(self._matrix_scan.search(codes_of(index), vectors, k, mask), METRICS[self.metric])

    def _mask(self, passing: Rows | None) -> Mask | None:
        """Which rows may be found; `None` for all."""
        size = len(self._entity_ids)
        if passing is None:
            return None if len(self.rows) == size else self._live[:size]
        mask = np.zeros(size, np.bool_)
        mask[passing] = True
        return mask

    # ── keeping the index in shape ──────────────────────────────────────────────────────────────────────────

    @property
    def build(self) -> Future[Head] | None:
        """The head under construction, if one is."""
        return self._build.head if self._build else None

    def maintain(self, submit: Callable[[Callable[[Callable[[], bool]], Any]], Future[Any]]) -> None:
        """Drop the dead rows when they are many, and bring the tail into the head when it is long.

        `submit` runs a function on the builder's thread; the function asks its argument whether to stop.
        """
        if self._build or monotonic() - self._failed_at < RETRY_S:
            return
        size, alive = len(self._entity_ids), len(self.rows)
        crowded = size - alive > max(LEAST_DEAD, DEAD_SHARE * size)
        if not crowded and size - self._head_size < self._longest_tail():
            return
        live = np.flatnonzero(self._live[:size])
        if crowded and (self._head is None or alive < self._worth):
            self._renumber(live, None)
        elif self._head and self._head.grows and not crowded:
            self._grow(self._head)
        else:
            # Without many dead rows the head is only extended: what it has keeps its rows.
            base = None if crowded else self._head
            kept = base.size if base else 0
            added = live[live >= kept]
            codes = self._gather(added)
            head = submit(lambda stopped: self._built(base, codes, stopped))
            self._build = _Build(np.append(np.arange(kept), added), size, head)

    @property
    def _worth(self) -> float:
        return self._kind.worth[self.index]

    def _longest_tail(self) -> float:
        if self._head is None:
            return self._worth
        if self._head.grows:
            return LEAST_TAIL
        share = QUIET_TAIL_SHARE if monotonic() - self._written_at > QUIET_S else TAIL_SHARE
        return max(LEAST_TAIL, self._head_size * share)

    def adopt(self) -> None:
        """Swap in the head whose construction is over."""
        if self._build is None or not self._build.head.done():
            return
        build, self._build = self._build, None
        size = len(self._entity_ids)
        if error := build.head.exception():
            self._failed(error)
            if self._head and self._head.grows:  # perhaps there is room for one without the other
                self._renumber(np.arange(size), None)
                self._failed_at = -RETRY_S
            return
        head = build.head.result()
        if head.size < len(build.order) and not (self._head and self._head.grows):  # which now makes room
            self._failed()
        self._renumber(np.append(build.order, np.arange(build.size, size)), head)

    def _failed(self, error: BaseException | None = None) -> None:
        self._failed_at = monotonic()
        _log.error("an index has not room for all rows; those outside of it are scanned", exc_info=error)

    def close(self) -> None:
        """It is not used again."""
        if self._head:
            self._head.release()

    def _grow(self, head: Head) -> None:
        """Bring the tail into the head, dead rows too: no row gets another number."""
        covered, codes = head.size, codes_of(self._tail)
        head.extended(codes, lambda: False)
        added = head.size - covered
        if added < len(codes):
            self._failed()
        if added:
            rest = flat(self.dimension, self.metric)
            if added < len(codes):
                rest.add_sa_codes(codes[added:])
            self._tail = rest

    def _built(self, base: Head | None, codes: Codes, stopped: Callable[[], bool]) -> Head:
        """On the builder's thread: `base`, or a new head, with the codes added."""
        head = base or self._kind(self.dimension, self.metric)
        try:
            return head.extended(codes, stopped)
        except BaseException:
            if head is not base:
                head.release()
            raise

    def _renumber(self, order: Rows, head: Head | None) -> None:
        """New row i is old row `order[i]`; the first of them lie in `head`, the others become the tail."""
        tail = flat(self.dimension, self.metric)
        rest = order[head.size if head else 0 :]
        if len(rest):
            tail.add_sa_codes(self._gather(rest))
        if self._head and self._head is not head:
            self._head.release()
        self._tail, self._head = tail, head
        self._live = self._live[order]
        self._entity_ids = [self._entity_ids[row] for row in order.tolist()]
        self.rows = {self._entity_ids[row]: row for row in np.flatnonzero(self._live).tolist()}
        self._columns.take(order)

    @property
    def _head_size(self) -> int:
        return self._head.size if self._head else 0

    def _gather(self, rows: Rows) -> Codes:
        """A copy of the codes of ascending rows."""
        if self._head is None:
            return codes_of(self._tail).take(rows, axis=0)
        split = np.searchsorted(rows, self._head_size)
        return np.concatenate(
            (
                codes_of(self._head.stored).take(rows[:split], axis=0),
                codes_of(self._tail).take(rows[split:] - self._head_size, axis=0),
            )
        )
