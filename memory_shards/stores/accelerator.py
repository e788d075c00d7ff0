"""Arrays on an accelerator, through the array API: of CuPy or PyTorch; or of NumPy, to run the same code without one.

What the standard lacks (the best of a row, a product of halves that sums up in more) is here, once for each library.
Looks at `mnemesh` only.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnemesh.errors import BadRequest

LIBRARIES = ("cupy", "torch")


class Accelerator:
    """One library on one device. `library`: `cupy`, `torch`, `numpy`, or empty for whichever finds a CUDA device.

    Raises `BadRequest` where there is none.
    """

    def __init__(self, library: str = "") -> None:
        self.library = library or _found()
        try:
            self._xp: Any = importlib.import_module(f"array_api_compat.{self.library}")
        except ImportError as error:
            raise BadRequest(f"cuda: {self.library} or array-api-compat is not installed: {error}") from error
        self._device: dict[str, Any] = {"device": "cuda"} if self.library == "torch" else {}

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """Halves."""
        return self._xp.zeros(shape, dtype=self._xp.float16, **self._device)

    def array(self, values: NDArray[Any]) -> Any:
        """A copy of the host's, of the same type."""
        return self._xp.asarray(np.ascontiguousarray(values), **self._device)

    def indices(self, rows: NDArray[Any]) -> Any:
        """Rows, to index with."""
        return self.array(rows.astype(np.int64))

    def host(self, array: Any) -> NDArray[Any]:
        """A copy on the host."""
        if self.library == "torch":
            array = array.cpu().numpy()
        elif self.library == "cupy":
            array = array.get()
        on_host: NDArray[Any] = np.asarray(array)
        return on_host

    def product(self, queries: Any, rows: Any, *, halves: bool) -> Any:
        """(q, d) fp32 by (n, d) fp16: (q, n). As halves, or widened first."""
        if halves:
            return self._xp.matmul(self._xp.astype(queries, self._xp.float16), rows.T)
        return self._xp.matmul(queries, self._xp.astype(rows, self._xp.float32).T)

    def squares(self, rows: Any) -> Any:
        """(n,) squared lengths of (n, d) rows, fp32."""
        wide = self._xp.astype(rows, self._xp.float32)
        return self._xp.sum(wide * wide, axis=1)

    def best(self, scores: Any, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k largest of each row, in no order: scores and places, on the host."""
        if self.library == "torch":
            values, places = scores.topk(k, dim=1, sorted=False)
        else:
            places = self._xp.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
            values = self._xp.take_along_axis(scores, places, axis=1)
        return self.host(values).astype(np.float32), self.host(places).astype(np.int64)

    def halves_at(self, matrix: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(q, c, d) fp32 of (q, c) rows of a matrix, on the host."""
        some = self.host(matrix[self.indices(rows.ravel())])
        return some.astype(np.float32).reshape(*rows.shape, -1)


def _found() -> str:
    """The first library that finds a CUDA device."""
    reasons = []
    for library in LIBRARIES:
        try:
            module = importlib.import_module(library)
            if library == "cupy":
                module.cuda.runtime.getDeviceCount()
            elif not module.cuda.is_available():
                raise RuntimeError("it finds no CUDA device")
        except Exception as error:  # noqa: BLE001 - a driver that is not there is told in many ways
            reasons.append(f"{library}: {str(error)[:80]}")
        else:
            return library
    raise BadRequest(f"cuda: no CUDA device for CuPy or PyTorch ({'; '.join(reasons)})")
