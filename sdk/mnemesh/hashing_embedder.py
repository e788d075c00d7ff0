"""`hashing:<dimension>`: an embedder without a model. Texts are near each other by the words and word parts they share.

Signed feature hashing (Weinberger et al. 2009, https://arxiv.org/abs/0902.2206) of words and, inside their boundaries,
character n-grams (Bojanowski et al. 2017, https://arxiv.org/abs/1607.04606), weighted by the root of their count, at
unit length. It knows nothing of meaning. The hash is BLAKE2b, so a text has the same vector on every machine.
Looks at `errors` only.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mnemesh.errors import BadRequest

MOST = 4_096
LEAST = 16
N_GRAMS = (3, 4, 5)
WORD_WEIGHT = 2.0
"""A whole word counts as so many of its parts."""
LONGEST_WORD = 64
"""Characters of a word that are taken apart. A longer one is no word, but still counts as a whole."""

_WORDS = re.compile(r"\w+")


class HashingEmbedder:
    """Vectors of `dimension` numbers."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.name = f"hashing:{dimension}"

    @classmethod
    def of(cls, dimension: str) -> HashingEmbedder:
        """By what is behind the colon of its name. Raises `BadRequest`."""
        if not (dimension.isascii() and dimension.isdecimal() and LEAST <= int(dimension[:9]) <= MOST):
            raise BadRequest(f"hashing:{dimension[:40]}: expected hashing:<dimension>, from {LEAST} to {MOST}")
        return cls(int(dimension))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of shape (n, dimension), each of length 1."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for feature, count in Counter(features_of(text)).items():
                place = _hash(feature)
                weight = (WORD_WEIGHT if feature[0] == _WORD else 1.0) * count**0.5
                vector[(place >> 1) % self.dimension] += weight if place & 1 else -weight
            if not vector.any():  # all that it has cancels out
                vector[_hash(text) % self.dimension] = 1.0
            vector /= np.linalg.norm(vector)
        return vectors


_WORD, _PART = "w", "p"


def features_of(text: str) -> Iterator[str]:
    """The words of a text, in whatever case and Unicode form, and their parts; where it has none, the text itself."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = _WORDS.findall(plain) or [plain]
    for word in words:
        yield _WORD + word
        bounded = f"<{word[:LONGEST_WORD]}>"
        for n in N_GRAMS:
            for start in range(len(bounded) - n + 1):
                yield _PART + bounded[start : start + n]


@lru_cache(maxsize=65_536)
def _hash(feature: str) -> int:
    return int.from_bytes(blake2b(feature.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
