"""A projection between its follower and its store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from test_merge import put

from memory_shards import projection as projections
from memory_shards.projection import Projection
from memory_shards.stores.faiss_cpu import FaissStore, VectorQuery
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.event import Record


async def test_what_a_follower_reads_again_after_a_failure_is_applied_once(tmp_path: Path) -> None:
    log = [Record(n, n, 0, put(ms=n, attributes={"n": n})) for n in range(1, 31)]
    projection = Projection("documents", SqliteStore(tmp_path, site="hub", partitions=frozenset({0}), incarnation="1"))
    await projection.offer(log[:20], 20)
    await projection.offer(log[:10], 10)  # from the slowest projection's place, which this one is past
    await projection.offer(log[10:], 30)
    running = asyncio.ensure_future(projection.run())
    await projection.watermark.reached(30)
    running.cancel()
    await asyncio.wait([running])
    assert projection.applied == 30
    await projection.close()


@contextlib.asynccontextmanager
async def over_vectors(folder: Path) -> AsyncIterator[Projection]:
    """A projection that applies to a store of vectors."""
    projection = Projection("vectors", FaissStore(folder))
    running = asyncio.ensure_future(projection.run())
    yield projection
    running.cancel()
    await asyncio.wait([running])
    await projection.close()


async def test_what_no_read_can_tell_is_put_off_and_none_of_it_is_lost(tmp_path: Path) -> None:
    patches = [Record(n, n, 0, put(ms=n, attributes={"n": n})) for n in range(1, 6)]
    vector = Record(6, 6, 0, put(ms=6, vectors={"default": np.ones(4, np.float32)}))
    async with over_vectors(tmp_path) as projection:
        await projection.offer(patches, 5)
        await projection.watermark.reached(5)
        assert (projection.store.watermark, projection.stands_at) == (0, 5)
    async with over_vectors(tmp_path) as projection:  # as after a crash: it is offered what its file does not have
        await projection.offer(patches, 5)
        await projection.offer([vector], 6)
        await projection.watermark.reached(6)
        assert projection.store.watermark == 6
        wanted = VectorQuery(tenant="acme", vector=np.ones(4, np.float32), filter={"n": 5})
        found = await projection.on_worker(projection.store.search, [wanted])  # type: ignore[attr-defined]
        assert [len(hits) for hits in found] == [1]


async def test_the_file_does_not_fall_far_behind_what_is_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "MOST_PUT_OFF", 10)
    async with over_vectors(tmp_path) as projection:
        for sequence in range(1, 31):
            await projection.offer([], sequence)
            await projection.watermark.reached(sequence)
            assert sequence - projection.store.watermark < 10
