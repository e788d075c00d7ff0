"""A projection between its follower and its store."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from test_merge import put
from test_sqlite_store import files_of, fill_and_forget

from memory_shards import projection as projections
from memory_shards.projection import Projection
from memory_shards.stores import VectorQuery, sqlite_batch
from memory_shards.stores.memory_vectors import MemoryVectors
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
    projection = Projection("vectors", MemoryVectors(folder))
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


# ── what no record asks for ─────────────────────────────────────────────────────────────────────────────────────


class Noted(SqliteStore):
    """A store that notes what its worker does. It waits at `gate` in each step, and sets `settled` after the last."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, site="hub", partitions=frozenset({0}), incarnation="1")
        self.done: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.loop, self.began, self.settled = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self.has_room = True

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        super().apply(records, watermark)
        self.done.append("apply")

    def settle(self) -> None:
        self.loop.call_soon_threadsafe(self.began.set)
        self.gate.wait()
        if not self.has_room:
            raise sqlite3.OperationalError("database or disk is full")
        super().settle()
        self.done.append("settle")
        if self.is_settled:
            self.loop.call_soon_threadsafe(self.settled.set)


@pytest_asyncio.fixture
async def unsettled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Noted:
    """A store that was opened with words left to erase, which takes more than a few steps."""
    monkeypatch.setattr(sqlite_batch, "PAGES_MERGED", 1)
    monkeypatch.setattr(projections, "SETTLE_EVERY_S", 0)
    with contextlib.closing(SqliteStore(tmp_path, site="hub", partitions=frozenset({0}), incarnation="1")) as store:
        fill_and_forget(store)
    return Noted(tmp_path)


@contextlib.asynccontextmanager
async def running(projection: Projection) -> AsyncIterator[None]:
    run = asyncio.ensure_future(projection.run())
    yield
    run.cancel()
    await asyncio.wait([run])
    await projection.close()


async def test_words_are_erased_though_no_event_comes(tmp_path: Path, unsettled: Noted) -> None:
    watermark = unsettled.watermark
    projection = Projection("documents", unsettled)
    async with running(projection):
        await unsettled.settled.wait()
        assert (projection.watermark.value, unsettled.watermark) == (watermark, watermark)
    assert set(unsettled.done) == {"settle"}
    assert b"hunter2" not in files_of(tmp_path)


async def test_a_record_that_comes_while_words_are_erased_waits_for_one_step(unsettled: Noted) -> None:
    projection, sequence = Projection("documents", unsettled), unsettled.watermark + 1
    unsettled.gate.clear()
    async with running(projection):
        await unsettled.began.wait()
        await projection.offer([Record(sequence, sequence, 0, put(attributes={"n": 1}))], sequence)
        unsettled.gate.set()
        await unsettled.settled.wait()
    assert unsettled.done[:3] == ["settle", "apply", "settle"]


async def test_a_store_without_room_to_erase_words_fails_once_and_goes_on_after_the_next_batch(
    unsettled: Noted,
) -> None:
    projection, sequence = Projection("documents", unsettled), unsettled.watermark + 1
    unsettled.has_room = False
    with pytest.raises(sqlite3.OperationalError):
        await projection.run()
    async with running(projection):
        unsettled.has_room = True
        await projection.offer([Record(sequence, sequence, 0, put(attributes={"n": 1}))], sequence)
        await unsettled.settled.wait()
    assert unsettled.done[:2] == ["apply", "settle"]
