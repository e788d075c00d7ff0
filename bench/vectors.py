"""Vectors to measure with: made, but with the structure that embeddings have."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from bench.documents import write_all
from bench.sampling import Work
from mnemesh import Consistency, Memory

DIMENSION = 384
LATENT = 32
K = 10


def made(
    count: int, queries: int, seed: int = 7
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Unit vectors of 384 dimensions that mix 32 latent ones, with noise; queries alike; their exact best rows."""
    random = np.random.default_rng(seed)
    vectors, asked = some(count, random), some(queries, random)
    exact = [np.argpartition(-(vectors @ query), K)[:K] for query in asked]
    return vectors, asked, np.stack(exact)


def some(count: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Unit vectors, float32."""
    mix = np.random.default_rng(0).standard_normal((LATENT, DIMENSION), np.float32)
    latent = random.standard_normal((count, LATENT), np.float32) @ mix
    noisy = latent + np.float32(0.3 * LATENT**0.5) * random.standard_normal((count, DIMENSION), np.float32)
    unit: np.ndarray[Any, Any] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    return unit


async def load(memory: Memory, vectors: np.ndarray[Any, Any], *, index: Any) -> None:
    """Write these as `row:0`, `row:1`, … of space `s`, until a search finds all of them."""
    await memory.upsert_embedding("row:0", vectors[0], space="s", index=index)
    rows = [
        {"entity_id": f"row:{row}", "attributes": {"tenth": row % 10}, "vectors": {"s": vector}}
        for row, vector in enumerate(vectors)
    ]
    written = Consistency(level="session", token=await write_all(memory, rows, senders=4))
    await memory.search_embedding(vectors[0], space="s", k=1, consistency=written, budget_ms=120_000)


def write_to_recall(writer: Memory, reader: Memory, vectors: np.ndarray[Any, Any]) -> Work:
    """Writes the next of these vectors, until the reader's search has found it."""
    numbers = itertools.count()

    async def recall() -> None:
        number = next(numbers)
        vector = vectors[number]
        written = await writer.upsert_embedding(f"new:{number}", vector, space="s")
        mine = Consistency(level="session", token=written.token)
        found = await reader.search_embedding(vector, space="s", k=1, scope="here", consistency=mine)
        assert found.hits[0].entity_id == f"new:{number}", "a write was not recalled"

    return recall
