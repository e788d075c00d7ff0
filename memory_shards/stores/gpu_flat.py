"""The head of a space on a GPU: every row of it compared there by FAISS, in fp16, and what matters once more in fp32.

FAISS's flat index on a GPU can neither replace nor remove a row, and knows no filter. So more is asked of it than is
wanted, what may not be found is dropped, and the rest is scored on the host, which has the rows too. Where it is not
sure then that there is no better one, the space scans those. The index moves all of its rows whenever it grows, so
there is one for every `SEGMENT_BYTES`. Looks at `flat`, `halves` and the SDK.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray

from memory_shards.stores.flat import FAISS, METRICS, Codes, Found, Mask, codes_of, flat, scored
from memory_shards.stores.halves import widened
from mnemesh.errors import BadRequest
from mnemesh.messages import IndexKind, Metric

_log = logging.getLogger(__name__)

SEGMENT_BYTES = 4 << 30
_STEP_BYTES = 32 << 20
"""Of halves at once on their way to the GPU, where they are floats."""

MOST_FOUND = 2_048
"""FAISS's largest `k` on a GPU."""

SPARE = 32
"""Candidates beyond twice `k` that are scored again."""

SCRATCH_BYTES = 512 << 20
"""Of the GPU's memory, for scores, once for all spaces of a process; FAISS would take 1.5 GiB."""

_one_at_a_time = threading.Lock()
"""Who uses that memory: a search, or a step of a build on another thread."""

HALF_EPSILON = 2.0**-11
"""What FAISS rounds queries by."""

SUM_ERROR = 2.0**-18
"""Of a sum of products in fp32, by the lengths of what is multiplied."""

LARGEST_HALF = 65_504


def check() -> None:
    """Raises `BadRequest` where this FAISS finds no GPU, or none with memory."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise BadRequest("faiss:gpu: this is faiss-cpu; install faiss-gpu in its place")
    if not FAISS.get_num_gpus():
        raise BadRequest("faiss:gpu: FAISS finds no GPU")
    try:
        with _one_at_a_time:
            _resources()
    except RuntimeError as error:
        raise BadRequest(f"faiss:gpu: {str(error)[:200]}") from error


@cache
def _resources() -> Any:
    """With their memory: FAISS takes it at the first use, and does not recover where there is none then."""
    resources = FAISS.StandardGpuResources()
    resources.setTempMemory(SCRATCH_BYTES)
    FAISS.GpuIndexFlat(resources, 1, faiss.METRIC_L2, FAISS.GpuIndexFlatConfig()).add(np.zeros((1, 1), np.float32))
    return resources


class GpuFlat:
    """Finds the same as a scan. Belongs to one thread at a time."""

    worth: ClassVar[dict[IndexKind, float]] = {"auto": 1_024, "hnsw": 1_024, "flat": 1_024}
    grows = True

    def __init__(self, dimension: int, metric: Metric) -> None:
        self.stored = flat(dimension, metric)
        self._metric: Metric = metric
        self._segments: list[Any] = []
        self._segment_rows = max(1, SEGMENT_BYTES // (2 * dimension))
        self._is_closed = True
        """Whether nothing may be added to the last segment."""
        self._longest = 0.0
        self._segment = self.segments(dimension, metric)

    @staticmethod
    def segments(dimension: int, metric: Metric) -> Callable[[], Any]:
        """What makes an empty index on the GPU."""
        config = FAISS.GpuIndexFlatConfig()
        config.useFloat16 = True
        return lambda: FAISS.GpuIndexFlat(_resources(), dimension, METRICS[metric], config)

    @property
    def size(self) -> int:
        return int(self.stored.ntotal)

    def release(self) -> None:
        """Give back what it has on the GPU, which nobody else may use meanwhile."""
        with _one_at_a_time:
            self._segments.clear()

    # ── rows ────────────────────────────────────────────────────────────────────────────────────────────────

    def extended(self, codes: Codes, stopped: Callable[[], bool]) -> GpuFlat:
        """Itself, with as many of the rows as the GPU has room for.

        Raises `InterruptedError` once it is `stopped`, and `RuntimeError` of FAISS where it has no row at all then.
        """
        step = max(1, _STEP_BYTES // codes.shape[1])
        start = 0
        while start < len(codes):
            if stopped():
                raise InterruptedError("the store is closing")
            try:
                start += self._add(codes[start : start + step])
            except RuntimeError as error:
                self._is_closed = True  # FAISS may have begun
                if not self.size:
                    raise
                _log.warning("the GPU has room for %d rows only: %s", self.size, str(error)[:200])
                break
        return self

    def _add(self, codes: Codes) -> int:
        """Add as many rows as the last segment takes; returns how many."""
        with _one_at_a_time:
            if self._is_closed or self._segments[-1].ntotal >= self._segment_rows:
                self._segments.append(self._segment())
                self._is_closed = False
        last = self._segments[-1]
        some = codes[: self._segment_rows - last.ntotal]
        numbers = widened(some, np.empty((len(some), some.shape[1] // 2), np.int32))
        with _one_at_a_time:
            last.add(numbers)
        self.stored.add_sa_codes(np.ascontiguousarray(some))
        self._longest = max(self._longest, float(np.sqrt(np.einsum("ij,ij->i", numbers, numbers).max())))
        return len(some)

    # ── searching ───────────────────────────────────────────────────────────────────────────────────────────

    def search(self, vectors: NDArray[np.float32], k: int, mask: Mask | None) -> Found:
        """The `k` best of the rows in `mask` (all if `None`).

        A query has rows of -1 where that is not sure: too few, or too many close together, are among the `MOST_FOUND`
        best; it does not fit fp16; or the GPU has no memory for it.
        """
        scores, rows = np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1)
        if k > MOST_FOUND:
            return scores, rows
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        scale = lengths if self._metric == "ip" else np.ones(len(vectors))
        asked = (vectors / np.where(scale > 0, scale, 1)[:, None]).astype(np.float32)
        passing = 1.0 if mask is None else float(mask.mean())
        largest = min(MOST_FOUND, self.size)
        most = min(int((2 * k + SPARE) / passing), largest)
        pending = np.flatnonzero(np.abs(asked).max(axis=1) <= LARGEST_HALF)
        while len(pending):
            try:
                rough, candidates = self._candidates(asked[pending], most)
            except RuntimeError as lacking:
                _log.warning("a search on the GPU failed; its rows are scanned: %s", str(lacking)[:200])
                break
            exact, best = self._scored_again(vectors[pending], candidates, k, mask)
            error = self._error(lengths[pending], exact[:, -1])
            sure = exact[:, -1] >= rough[:, -1] * scale[pending] + error
            if most == self.size:
                sure[:] = True
            scores[pending[sure]], rows[pending[sure]] = exact[sure], best[sure]
            pending = pending[~sure]
            if most == largest:
                break
            most = min(4 * most, largest)
        return scores, rows

    def _error(self, lengths: NDArray[np.float64], kth: NDArray[np.float32]) -> NDArray[np.float64]:
        """How much better than they are there rows may be that are as good as the k-th, for queries so long."""
        if self._metric != "l2":
            return 2 * HALF_EPSILON * lengths * self._longest
        rounded = HALF_EPSILON * lengths
        return 2 * np.sqrt(np.maximum(-kth, 0)) * rounded + rounded**2 + SUM_ERROR * (lengths + self._longest) ** 2

    def _candidates(self, vectors: NDArray[np.float32], most: int) -> Found:
        """The best of each segment, merged: (q, most) scores and rows."""
        scores, rows, first = [], [], 0
        for segment in self._segments:
            if not (size := int(segment.ntotal)):
                continue
            with _one_at_a_time:
                found = scored(segment.search(vectors, min(most, size)), METRICS[self._metric])
            begun = found[1] >= size  # of rows that did not find room
            scores.append(np.where(begun, -np.inf, found[0]))
            rows.append(np.where(begun, -1, found[1] + first))
            first += size
        all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
        best = np.argsort(-all_scores, axis=1, kind="stable")[:, :most]
        return np.take_along_axis(all_scores, best, 1), np.take_along_axis(all_rows, best, 1)

    def _scored_again(self, vectors: NDArray[np.float32], rows: NDArray[np.int64], k: int, mask: Mask | None) -> Found:
        """The `k` best of (q, c) rows, by their exact scores."""
        scores = self._exact(vectors, rows)
        scores[rows < 0 if mask is None else (rows < 0) | ~mask[rows]] = -np.inf
        if scores.shape[1] < k:
            lacking = ((0, 0), (0, k - scores.shape[1]))
            scores = np.pad(scores, lacking, constant_values=-np.inf)
            rows = np.pad(rows, lacking, constant_values=-1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return scores, np.where(np.isneginf(scores), -1, rows)

    def _exact(self, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(q, c) scores of (q, c) rows, from what the host has of them."""
        codes = codes_of(self.stored)
        scores = np.empty(rows.shape, np.float32)
        step = max(1, _STEP_BYTES // (rows.shape[1] * codes.shape[1]))
        for start in range(0, len(rows), step):
            some = codes[rows[start : start + step].ravel()]
            numbers = widened(some, np.empty((len(some), some.shape[1] // 2), np.int32))
            numbers = numbers.reshape(*rows[start : start + step].shape, -1)
            asked = vectors[start : start + step, None, :]
            if self._metric == "l2":
                numbers -= asked
                scores[start : start + step] = -np.einsum("qcd,qcd->qc", numbers, numbers)
            else:
                scores[start : start + step] = np.einsum("qcd,qd->qc", numbers, asked[:, 0])
        return scores
