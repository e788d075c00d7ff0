"""A projection between its follower and its store."""

from __future__ import annotations

import asyncio
from pathlib import Path

from test_merge import put

from memory_shards.projection import Projection
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
