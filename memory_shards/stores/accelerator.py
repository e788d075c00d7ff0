"""Arrays on an accelerator, through the array API: of CuPy or PyTorch; or of NumPy, to run the same code without one.

What the standard lacks (the largest of a row, a product of halves that sums up in more) is here, once for each library.
What a method takes and gives is on the device, unless it says NumPy. Looks at `mnemesh` only.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnemesh.errors import BadRequest

LIBRARIES = ("torch", "cupy")
"""By preference: PyTorch selects the largest of many, CuPy sorts them all."""

GROUP = 32
"""So many scores are first represented by their largest: to find that reads them once, and to choose among all takes
several times as long."""


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
        """A copy of NumPy's, of the same type."""
        return self._xp.asarray(np.array(values, order="C"), **self._device)

    def indices(self, rows: NDArray[Any]) -> Any:
        """NumPy's rows, to index with."""
        return self.array(rows.astype(np.int64))

    def host(self, array: Any) -> NDArray[Any]:
        """As NumPy's."""
        if self.library == "torch":
            array = array.cpu().numpy()
        elif self.library == "cupy":
            array = array.get()
        on_host: NDArray[Any] = np.asarray(array)
        return on_host

    def product_of_halves(self, queries: Any, rows: Any) -> Any:
        """(q, d) fp32 by (n, d) fp16: (q, n) fp16."""
        return self._xp.matmul(self._xp.astype(queries, self._xp.float16), rows.T)

    def wide(self, values: Any) -> Any:
        """As fp32."""
        return self._xp.astype(values, self._xp.float32)

    def sums(self, values: Any) -> Any:
        """Along the last axis."""
        return self._xp.sum(values, axis=-1)

    def mean(self, rows: Any) -> Any:
        """(1, d) of (n, d)."""
        return self._xp.mean(rows, axis=0, keepdims=True)

    def best(self, scores: Any, k: int) -> tuple[Any, Any]:
        """The k largest of each row of (q, n), in no order: (q, k) scores and places."""
        count, size = scores.shape
        whole = size // GROUP * GROUP
        if whole < 2 * GROUP * k:
            return self._largest(scores, k)
        # The k largest are in the k groups whose largest are.
        groups = self._xp.reshape(scores[:, :whole], (count, -1, GROUP))
        _, chosen = self._largest(self._xp.max(groups, axis=2), k)
        inside = self.indices(np.arange(GROUP))
        places = self._xp.reshape(chosen[:, :, None] * GROUP + inside[None, None, :], (count, -1))
        rest = self._xp.broadcast_to(self.indices(np.arange(whole, size))[None, :], (count, size - whole))
        places = self._xp.concat((places, rest), axis=1)
        values, at = self._largest(self._xp.take_along_axis(scores, places, axis=1), k)
        return values, self._xp.take_along_axis(places, at, axis=1)

    def _largest(self, scores: Any, k: int) -> tuple[Any, Any]:
        if self.library == "torch":
            values, places = scores.topk(k, dim=1, sorted=False)
            return values, places
        places = self._xp.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
        return self._xp.take_along_axis(scores, places, axis=1), places

    def side_by_side(self, parts: Sequence[Any]) -> Any:
        """(q, …) parts as one."""
        return self._xp.concat(tuple(parts), axis=1)

    def at(self, values: Any, places: Any) -> Any:
        """(q, k) values at places of each row."""
        return self._xp.take_along_axis(values, places, axis=1)


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
