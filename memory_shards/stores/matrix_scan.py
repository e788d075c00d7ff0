"""Exact search for many queries at once: rows of fp16 become fp32 block by block, each for one matrix product.

FAISS scans an SQfp16 index for one query after another. From some 10 queries on a matrix product per block wins, though
the block has first to be widened; no fp32 copy of a space has to be kept. Looks at `flat` and `halves`.
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from memory_shards.stores.flat import FAISS
from memory_shards.stores.halves import widened

MATRIX_FROM = 10
"""How many queries make the matrix product worth it. Milliseconds a batch, SQfp16 → matrix product, one thread,
faiss-cpu 1.15.1 with AVX-512; the scan slows down further where rows are masked, the product does not:

    queries         1         4         8        12        16        32        64
    20,000 x 384    0.8 → 5.2  2.8 → 4.9  4.9 → 6.1  7.7 → 6.4  11 → 8.2  19 → 10   30 → 15
    50,000 x 384    2.9 → 12   8.6 → 12   18 → 17    30 → 16    35 → 17   75 → 25  135 → 42
"""

_BLOCK_BYTES = 3 << 20

# Below this FAISS multiplies query by query without BLAS. It is global, but nothing else in a shard's process searches
# fp32 rows exhaustively; DESIGN's `3 * d` is for those who ask with single queries too.
FAISS.cvar.distance_compute_blas_threshold = 1


class MatrixScan:
    """Searches the rows of one space. Holds a block's worth of scratch memory; belongs to one thread."""

    def __init__(self, dimension: int, metric: int) -> None:
        self._dimension = dimension
        self._metric = metric
        self._rows = max(64, _BLOCK_BYTES // (4 * dimension))
        self._bits = np.empty((0, dimension), np.int32)

    def search(
        self, codes: NDArray[np.uint8], vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(q, k) distances as FAISS gives them for the metric, and rows; row -1 where there are no more.

        `codes`: (n, 2 d) bytes of n rows of fp16. Only rows in `mask` are found (all if `None`).
        """
        if not len(self._bits):
            self._bits = np.empty((self._rows, self._dimension), np.int32)
        heap = FAISS.ResultHeap(len(vectors), k, keep_max=self._metric == faiss.METRIC_INNER_PRODUCT)
        for start in range(0, len(codes), self._rows):
            some = codes[start : start + self._rows]
            wide = widened(some, self._bits[: len(some)])
            if mask is not None:
                # What is compared with NaN never wins, except where FAISS looks for a single best.
                wide[~mask[start : start + self._rows]] = np.nan
            distances, rows = FAISS.knn(vectors, wide, max(k, 2), metric=self._metric)
            heap.add_result(distances, np.where(rows < 0, rows, rows + start))
        heap.finalize()
        return heap.D, heap.I
