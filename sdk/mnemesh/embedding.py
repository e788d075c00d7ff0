"""Embedders: what turns texts into vectors, chosen by a name such as `hashing:384`.

An agent that searches a view's space embeds its question by the same name: `await memory.search_embedding(
embedder("hashing:384").embed(["…"])[0], space=…)`. A new kind is one entry of `KINDS`. Looks at `errors` and
`hashing_embedder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mnemesh.errors import BadRequest
from mnemesh.hashing_embedder import HashingEmbedder


class Embedder(Protocol):
    """Turns texts into vectors. The same text always becomes the same vector, in whatever batch it comes.

    `embed` may block for long, and is called from one thread at a time.
    """

    @property
    def name(self) -> str:
        """What it is chosen by, and what a space says of what made its vectors."""

    @property
    def dimension(self) -> int:
        """Numbers in a vector: 1 to 4,096."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of shape (n, dimension), one for each of n texts."""


KINDS: dict[str, Callable[[str], Embedder]] = {"hashing": HashingEmbedder.of}
"""By what is before the colon of a name; what is behind it the maker gets. It raises `BadRequest`."""


@cache
def embedder(name: str) -> Embedder:
    """The embedder of a name. Raises `BadRequest` where there is none."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise BadRequest(f"no embedder {name[:80]!r}; expected one of {', '.join(f'{known}:…' for known in KINDS)}")
    return KINDS[kind](rest)
