"""The head of a space on a GPU: every row of it compared there by FAISS, in fp16, and what matters once more in fp32.

FAISS's flat index on a GPU can neither replace nor remove a row, and knows no filter. So more is asked of it than is
wanted, what may not be found is dropped, and the rest is scored on the host, which has the rows too. Where that leaves
too little, the space scans those. The index moves all of its rows whenever it grows, so there is one for every
`SEGMENT_BYTES`. Looks at `flat`, `halves` and the SDK.
"""

from __future__ import annotations

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
LARGEST_HALF = 65_504


def check() -> None:
    """Raises `BadRequest` where this FAISS finds no GPU."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise BadRequest("faiss:gpu: this is faiss-cpu; install faiss-gpu in its place")
    if not FAISS.get_num_gpus():
        raise BadRequest("faiss:gpu: FAISS finds no GPU")


@cache
def _resources() -> Any:
    resources = FAISS.StandardGpuResources()
    resources.setTempMemory(SCRATCH_BYTES)
    return resources


class GpuFlat:
    """Exact search. Belongs to one thread at a time."""

    worth: ClassVar[dict[IndexKind, float]] = {"auto": 1_024, "hnsw": 1_024, "flat": 1_024}
    grows = True

    def __init__(self, dimension: int, metric: Metric) -> None:
        self.stored = flat(dimension, metric)
        self._metric: Metric = metric
        self._segments: list[Any] = []
        self._segment_rows = max(1, SEGMENT_BYTES // (2 * dimension))
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

    def extended(self, codes: Codes, stopped: Callable[[], bool]) -> GpuFlat:
        """Itself. Raises `RuntimeError` where the GPU's memory is full, and keeps what found room."""
        step = max(1, _STEP_BYTES // codes.shape[1])
        start = 0
        while start < len(codes):
            if stopped():
                raise InterruptedError("the store is closing")
            if not self._segments or self._segments[-1].ntotal >= self._segment_rows:
                with _one_at_a_time:
                    self._segments.append(self._segment())
            last = self._segments[-1]
            some = codes[start : start + min(step, self._segment_rows - last.ntotal)]
            numbers = widened(some, np.empty((len(some), some.shape[1] // 2), np.int32))
            with _one_at_a_time:
                last.add(numbers)
            self.stored.add_sa_codes(np.ascontiguousarray(some))  # what failed on the GPU is not there either
            self._longest = max(self._longest, float(np.sqrt(np.einsum("ij,ij->i", numbers, numbers).max())))
            start += len(some)
        return self

    def search(self, vectors: NDArray[np.float32], k: int, mask: Mask | None) -> Found:
        """The `k` best of the rows in `mask` (all if `None`); row -1 where too few were among the `MOST_FOUND` best."""
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        scale = lengths if self._metric == "ip" else np.ones(len(vectors))
        asked = (vectors / np.where(scale > 0, scale, 1)[:, None]).astype(np.float32)
        if np.abs(asked).max() > LARGEST_HALF or k > MOST_FOUND:
            return np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1)
        error = 2 * HALF_EPSILON * lengths * self._longest
        if self._metric == "l2":
            error = 2 * (error + 2 * HALF_EPSILON * lengths**2)
        passing = 1.0 if mask is None else max(float(mask.mean()), 1 / len(mask))
        most = min(int((2 * k + SPARE) / passing), MOST_FOUND, self.size)
        while True:
            rough, rows = self._candidates(asked, most)
            found = self._scored_again(vectors, rows, k, mask)
            sure = found[0][:, -1] >= rough[:, -1] * scale + error
            if most == min(MOST_FOUND, self.size) or sure.all():
                return found
            most = min(4 * most, MOST_FOUND, self.size)  # as many lie close together, or may not be found

    def _candidates(self, vectors: NDArray[np.float32], most: int) -> Found:
        """The best of each segment, merged: (q, most) scores and rows."""
        scores, rows, first = [], [], 0
        for segment in self._segments:
            with _one_at_a_time:
                found = scored(segment.search(vectors, min(most, segment.ntotal)), METRICS[self._metric])
            scores.append(found[0])
            rows.append(found[1] + first)
            first += segment.ntotal
        all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
        best = np.argsort(-all_scores, axis=1, kind="stable")[:, :most]
        return np.take_along_axis(all_scores, best, 1), np.take_along_axis(all_rows, best, 1)

    def _scored_again(self, vectors: NDArray[np.float32], rows: NDArray[np.int64], k: int, mask: Mask | None) -> Found:
        """The `k` best of (q, c) rows, by their exact scores."""
        halves = codes_of(self.stored)[rows.ravel()].view(np.float16)
        numbers = halves.astype(np.float32).reshape(*rows.shape, -1)
        asked = vectors[:, None, :]
        each = -np.square(numbers - asked) if self._metric == "l2" else numbers * asked
        scores: NDArray[np.float32] = each.sum(axis=2, dtype=np.float32)
        if mask is not None:
            scores[~mask[rows]] = -np.inf
        if scores.shape[1] < k:
            lacking = ((0, 0), (0, k - scores.shape[1]))
            scores = np.pad(scores, lacking, constant_values=-np.inf)
            rows = np.pad(rows, lacking, constant_values=-1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return scores, np.where(np.isneginf(scores), -1, rows)
