"""The gpu suite: ten million vectors searched on a GPU, beside what its memory's bandwidth allows; and a router over
shards with a GPU and without.

A search for one query or for many reads every row once. So the bound is: the batch's queries, by the time that it takes
to read all rows as fast as this device reads an array.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np

from bench.report import Row, ratio, value
from bench.sampling import calls_a_second
from bench.sites import agent_of, running_mesh
from bench.suite import measured
from bench.vectors import DIMENSION, K, load, made, some
from cli.mesh import Mesh
from memory_shards.stores.accelerator import Accelerator
from memory_shards.stores.by_url import space_maker
from memory_shards.stores.halves import halved
from memory_shards.stores.memory_vectors import AnySpace
from memory_shards.stores.urls import StoreUrls, environment

BATCHES = (1, 8, 64, 256)
CHUNK = 100_000
ROUNDS = 9
READ_BYTES = 1 << 30
CALLERS = 64


class Sizes:
    """How much of everything. `quick` is for trying the suite out; its figures mean little."""

    def __init__(self, quick: bool, urls: Sequence[str]) -> None:
        self.urls = urls
        self.vectors = 20_000 if quick else 10_000_000
        self.in_mesh = 2_000 if quick else 100_000
        self.read = READ_BYTES // 16 if quick else READ_BYTES
        self.seconds = 0.5 if quick else 3.0


async def run(quick: bool, wanted: Sequence[str], urls: Sequence[str]) -> list[Row]:
    """Measure what is wanted, or everything, on each of these. Raises `BadRequest` where one finds no GPU."""
    for url in urls:
        space_maker(StoreUrls(vectors=url).vectors)
    groups = (
        (tuple(name for url in urls for name in names_of(url)), search),
        (tuple(f"{name}_{part}" for name in map(name_of, urls) for part in ("mesh_rate", "mesh_recall")), search_mesh),
    )
    return await measured(groups, Sizes(quick, urls), wanted)


def name_of(url: str) -> str:
    return url.rstrip(":").replace(":", "_")


def names_of(url: str) -> list[str]:
    name = name_of(url)
    return [f"{name}_build_rate", f"{name}_recall", *(f"{name}_search_{batch}" for batch in BATCHES)]


# ── one process ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def search(sizes: Sizes) -> list[Row]:
    """Queries a second of a space on each device, beside the bound; its recall beside an exact search in fp32."""
    return await asyncio.to_thread(_search, sizes)


def _search(sizes: Sizes) -> list[Row]:
    rows_a_second = bandwidth(sizes) / (2 * DIMENSION)
    spaces = {url: space_maker(url)(1, DIMENSION, "cosine", "auto", None) for url in sizes.urls}
    queries = some(max(BATCHES), np.random.default_rng(1))
    took, exact = build(spaces, sizes.vectors, queries)
    rows = []
    for url, space in spaces.items():
        name = name_of(url)
        found = space.search(queries, K)[1]
        recall = float(np.mean([len(set(ours) & set(best)) / K for ours, best in zip(found, exact, strict=True)]))
        rows += [
            Row(name=f"{name}_build_rate", value=sizes.vectors / took[url], unit="vectors/s"),
            Row(name=f"{name}_recall", value=recall, unit="", goal=value("at least", 0.99), runs=len(queries)),
        ]
        for batch in BATCHES:
            seconds = median(timed(space, queries[:batch]) for _ in range(ROUNDS))
            rows.append(
                Row(
                    name=f"{name}_search_{batch}",
                    value=batch / seconds,
                    unit="queries/s",
                    reference=batch * rows_a_second / sizes.vectors,
                    goal=ratio("at least", 0.5) if batch == 64 else None,
                    runs=ROUNDS,
                    holds=recall >= 0.99,
                )
            )
    return rows


def build(
    spaces: dict[str, AnySpace], count: int, queries: np.ndarray[Any, Any]
) -> tuple[dict[str, float], np.ndarray[Any, Any]]:
    """Put so many vectors into each space; the seconds that each took, and the exact (q, K) best rows."""
    took = dict.fromkeys(spaces, 0.0)
    scores = np.full((len(queries), K), -np.inf, np.float32)
    rows = np.full((len(queries), K), -1)
    with ThreadPoolExecutor(1) as builder:
        for space in spaces.values():
            space.reserve(count)
        for first in range(0, count, CHUNK):
            vectors = some(min(CHUNK, count - first), np.random.default_rng(100 + first))
            names = [f"row:{row}" for row in range(first, first + len(vectors))]
            for url, space in spaces.items():
                began = time.perf_counter()
                space.put(names, halved(vectors, "cosine")[0])
                space.maintain(lambda work: builder.submit(work, lambda: False))
                if space.build:
                    space.build.result()
                    space.adopt()
                took[url] += time.perf_counter() - began
            product = queries @ vectors.T
            best = np.argpartition(-product, K, axis=1)[:, :K]
            scores = np.concatenate((scores, np.take_along_axis(product, best, 1)), axis=1)
            rows = np.concatenate((rows, best + first), axis=1)
            order = np.argsort(-scores, axis=1)[:, :K]
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return took, rows


def timed(space: AnySpace, queries: np.ndarray[Any, Any]) -> float:
    began = time.perf_counter()
    space.search(queries, K)
    return time.perf_counter() - began


def bandwidth(sizes: Sizes) -> float:
    """Bytes a second that the device of the first URL reads and writes. Raises `BadRequest` where no library does."""
    kind, _, library = sizes.urls[0].partition(":")
    accelerator = Accelerator(library if kind == "cuda" else "")
    numbers = accelerator.array(np.zeros(sizes.read // 4, np.int32))

    def once() -> float:
        began = time.perf_counter()
        accelerator.host((numbers + numbers)[:1])  # which waits for it
        return time.perf_counter() - began

    once()
    return 2 * sizes.read / median(once() for _ in range(ROUNDS))


# ── a router over shards with a GPU and without ─────────────────────────────────────────────────────────────────────


async def search_mesh(sizes: Sizes) -> list[Row]:
    """Two shards on the device and two on the CPU, searched as one: queries a second, and recall of the whole."""
    vectors, queries, exact = made(4 * sizes.in_mesh, 256)
    rows = []
    for url in sizes.urls:
        async with running_mesh(shards=4) as mesh, agent_of(mesh) as memory:
            for shard in ("s0.0", "s1.0"):
                await search_on(mesh, shard, url)
            await load(memory, vectors, index="auto")
            recalled, turn = 0, iter(range(1_000_000_000))
            for query, best in zip(queries, exact, strict=True):
                found = await memory.search_embedding(query, space="s", k=K)
                recalled += len({hit.entity_id for hit in found.hits} & {f"row:{row}" for row in best})

            async def ask() -> object:
                return await memory.search_embedding(queries[next(turn) % len(queries)], space="s", k=K)  # noqa: B023

            rate = await calls_a_second(ask, CALLERS, sizes.seconds)
        name = name_of(url)
        recall = recalled / (K * len(queries))
        rows += [
            Row(name=f"{name}_mesh_rate", value=rate, unit="queries/s"),
            Row(name=f"{name}_mesh_recall", value=recall, unit="", goal=value("at least", 0.98), runs=len(queries)),
        ]
    return rows


async def search_on(mesh: Mesh, name: str, url: str) -> None:
    """Start a shard anew that searches there: its file of vectors is the same."""
    child = mesh.children[name]
    child.environment = {**child.environment, environment("vectors"): url}
    before = child.restarts
    child.send(signal.SIGTERM)
    while child.restarts == before:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.05)
    await mesh.ready()
