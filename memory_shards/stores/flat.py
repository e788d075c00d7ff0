"""FAISS's flat index of fp16 rows: made, read in place and scanned. Looks at FAISS, NumPy and `mnemesh` only."""

from __future__ import annotations

from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from mnemesh.messages import Metric

FAISS: Any = faiss  # its type stubs lack some signatures
QT_FP16 = faiss.ScalarQuantizer.QT_fp16
METRICS = {"cosine": faiss.METRIC_INNER_PRODUCT, "ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}

Codes: TypeAlias = NDArray[np.uint8]
"""(n, 2 d) bytes of n rows of fp16."""

Mask: TypeAlias = NDArray[np.bool_]
Found: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""(q, k) scores, larger is better, and (q, k) rows, best first; row -1 where there was no more."""


def flat(dimension: int, metric: Metric) -> Any:
    """An empty one."""
    return faiss.IndexScalarQuantizer(dimension, QT_FP16, METRICS[metric])


def codes_of(index: Any) -> Codes:
    """A flat index's own memory, without a copy: valid until the index grows."""
    if not index.ntotal:
        return np.zeros((0, index.code_size), np.uint8)
    memory: Codes = faiss.rev_swig_ptr(index.codes.data(), index.codes.size())
    return memory.reshape(index.ntotal, index.code_size)


def search(index: Any, vectors: NDArray[np.float32], k: int, mask: Mask | None, parameters: Any = None) -> Found:
    """Let an index of FAISS search its rows in `mask` (all if `None`), with parameters of its kind."""
    parameters = parameters or faiss.SearchParameters()
    if mask is not None:
        bits = np.packbits(mask, bitorder="little")
        parameters.sel = faiss.IDSelectorBitmap(index.ntotal, faiss.swig_ptr(bits))
    return scored(index.search(np.ascontiguousarray(vectors), k, params=parameters), index.metric_type)


def scored(found: Found, metric_type: int) -> Found:
    """What FAISS found, with scores in place of distances."""
    return (-found[0], found[1]) if metric_type == faiss.METRIC_L2 else found


def merged(one: Found, other: Found, k: int) -> Found:
    """The `k` best of both."""
    scores = np.concatenate((one[0], other[0]), axis=1)
    rows = np.concatenate((one[1], other[1]), axis=1)
    scores[rows < 0] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
