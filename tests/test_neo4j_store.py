"""What is Neo4j's own: nodes that shards share, and the lock by which one of those who apply waits for the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import neo4j
import pytest
from backends import Backend, apply, endless
from test_merge import forget, put
from test_stores import edge, log_of

from bench.store_servers import Neo4jServer
from memory_shards import breaker
from memory_shards.stores import neo4j_batch, neo4j_store
from memory_shards.stores.neo4j_client import Target
from memory_shards.stores.neo4j_reader import Neo4jEdges
from memory_shards.stores.neo4j_store import Neo4jStore
from memory_shards.stores.urls import StoreUrls
from mnemesh.event import Record
from mnemesh.ids import PARTITIONS, partition_of

LOW, HIGH = frozenset(range(PARTITIONS // 2)), frozenset(range(PARTITIONS // 2, PARTITIONS))
POLL_S = 0.01


@pytest.fixture
def backend(neo4j_server: Neo4jServer, tmp_path: Path) -> Backend:
    return Backend.of(StoreUrls(edges=neo4j_server.url), tmp_path / "stores")


@pytest.fixture
def session(neo4j_server: Neo4jServer) -> Iterator[neo4j.Session]:
    """What somebody else does in the same database."""
    target = Target.of(neo4j_server.url)
    with (
        neo4j.GraphDatabase.driver(target.uri, **target.options) as driver,
        driver.session(database=target.database) as session,
    ):
        yield session


def named(partitions: frozenset[int], name: str) -> str:
    """An entity in one of these partitions."""
    return next(each for n in range(999) if partition_of("acme", each := f"{name}{n}") in partitions)


def is_waited_for(session: neo4j.Session) -> bool:
    """Whether some transaction waits for the lock of another."""
    blocked = "SHOW TRANSACTIONS YIELD status WHERE status STARTS WITH 'Blocked' RETURN count(*) AS blocked"
    return bool(session.run(blocked).single(strict=True)["blocked"])


async def until_waited_for(session: neo4j.Session, *, group: Sequence[asyncio.Task[Any]]) -> None:
    """Wait until one of these waits for a lock, or none is left that could."""
    while not all(task.done() for task in group):
        if await asyncio.to_thread(is_waited_for, session):
            return
        await asyncio.sleep(POLL_S)


def latches(store: Any) -> tuple[asyncio.Event, asyncio.Event]:
    """Have a store stop, and say that it has, until it may go on."""
    loop, reached, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        reached.set()
        await go_on.wait()

    store.stop = lambda: asyncio.run_coroutine_threadsafe(pause(), loop).result()
    return reached, go_on


# ── two shards, one node ────────────────────────────────────────────────────────────────────────────────────


class Paused:
    """A transaction that stops before a statement, until it may go on."""

    def __init__(self, tx: neo4j.ManagedTransaction, before: str, stop: Any) -> None:
        self._tx, self._before, self._stop = tx, before, stop

    def run(self, cypher: str, *arguments: Any, **named: Any) -> neo4j.Result:
        if cypher == self._before:
            self._stop()
        return self._tx.run(cypher, *arguments, **named)


class PausedStore(Neo4jStore):
    """One whose edges are put when `stop` returns: by then their targets are there."""

    stop: Any = None

    def _apply(self, tx: Any, records: Sequence[Record], watermark: int, after: int) -> int:
        return super()._apply(Paused(tx, neo4j_batch._PUT_EDGES, self.stop), records, watermark, after)  # type: ignore[arg-type]


@asynccontextmanager
async def shard_of(backend: Backend, name: str, partitions: frozenset[int], kind: type[Neo4jStore]) -> Any:
    """The edges of some partitions, ready to apply."""
    store = kind(backend.urls.edges, site=backend.origin.site, shard=name, partitions=partitions, incarnation="1")
    edges = Neo4jEdges(store)
    try:
        await edges.projection.open()
        await edges.projection.begin(endless)
        yield edges, store
    finally:
        await edges.close()


async def test_a_node_that_another_shard_drops_stays_while_an_edge_to_it_is_written(
    backend: Backend, session: neo4j.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neo4j_store, "WRITE_S", 60.0)  # it is held up here
    mine, theirs = named(LOW, "mine"), named(HIGH, "theirs")
    log = log_of(
        put(ms=1, entity_id=theirs, edges=[edge("target")]),
        put(ms=2, entity_id=mine, edges=[edge("target")]),
        forget(ms=3, entity_id=theirs),
    )
    async with (
        shard_of(backend, "s0", LOW, PausedStore) as (edges, store),
        shard_of(backend, "s1", HIGH, Neo4jStore) as (_, other),
    ):
        await asyncio.to_thread(other.apply, [log[0]], 1)
        reached, go_on = latches(store)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(store.apply, [log[1]], 2))
            await reached.wait()
            forgetting = group.create_task(asyncio.to_thread(other.apply, [log[2]], 3, 1))
            await until_waited_for(session, group=[forgetting])
            go_on.set()
        assert (await edges.edges_of("acme", mine))[0] == [edge("target")]
        assert (await edges.expand("acme", ["target"], [], "in", 9)).edges == [("target", "near", mine)]


# ── a commit is under way ───────────────────────────────────────────────────────────────────────────────────


class Committing(Neo4jStore):
    """One that commits when `stop` returns."""

    stop: Any = None

    def _apply(self, tx: neo4j.ManagedTransaction, records: Sequence[Record], watermark: int, after: int) -> int:
        reached = super()._apply(tx, records, watermark, after)
        if self.stop is not None:
            self.stop()
        return reached


async def test_a_read_during_a_commit_waits_for_all_of_it(
    backend: Backend, session: neo4j.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neo4j shows what commits piece by piece: of ten edges that a batch replaced, one or two were seen at times."""
    monkeypatch.setattr(neo4j_store, "WRITE_S", 60.0)
    monkeypatch.setattr(breaker, "ANSWER_S", 60.0)
    log = log_of(put(ms=1, edges=[edge("a")]), put(ms=2, edges=[edge("b")], remove_edges=[edge("a")]))
    async with shard_of(backend, "s0", LOW | HIGH, Committing) as (edges, store):
        await asyncio.to_thread(store.apply, log[:1], 1)
        reached, go_on = latches(store)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(store.apply, log, 2, 1))
            await reached.wait()
            reads = [
                group.create_task(edges.edges_of("acme", "pump")),
                group.create_task(edges.expand("acme", ["pump"], [], "out", 9)),
                group.create_task(edges.expand("acme", ["pump"], [], "out", 9, ahead=1)),
            ]
            await until_waited_for(session, group=reads)
            go_on.set()
        assert reads[0].result()[0] == [edge("b")]
        assert {tuple(read.result().edges) for read in reads[1:]} == {(("pump", "near", "b"),)}


async def test_a_commit_that_never_ended_keeps_nobody_from_reading(backend: Backend, session: neo4j.Session) -> None:
    """Who applied died after it had said that it commits, and nothing more is written."""
    async with backend.opened() as stores:
        await apply(stores, log_of(put(ms=1, edges=[edge("a")])))
        shard = f"{backend.origin.site}.s0"
        session.run(neo4j_store._BEGUN, shard=shard, commit="died").consume()
        assert (await stores.edges.edges_of("acme", "pump"))[0] == [edge("a")]
        found = session.run("MATCH (c:Commit {key: $shard}) RETURN c.begun, c.ended", shard=shard).single(strict=True)
        assert found.values() == ["died", "died"]  # so the next need not ask for the lock


# ── one shard, two who apply ────────────────────────────────────────────────────────────────────────────────


async def test_who_waits_too_long_for_the_lock_is_refused_and_applies_once_it_is_free(
    backend: Backend, session: neo4j.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the replica that applied hangs in the middle of a transaction."""
    log = log_of(*(put(ms=n, edges=[edge(f"t{n}")]) for n in range(1, 9)))
    async with backend.opened() as stores:
        await apply(stores, log[:4])
        monkeypatch.setattr(neo4j_store, "WRITE_S", 0.2)
        store = stores.outside[0].store
        with session.begin_transaction() as hanging:
            hanging.run(neo4j_store._LOCK, shard=f"{backend.origin.site}.s0").consume()
            async with asyncio.timeout(30):
                with pytest.raises(neo4j.exceptions.Neo4jError) as refused:
                    await stores.outside[0].on_worker(store.apply, log[4:], 8, 4)
            assert isinstance(refused.value, store.outages)
            assert await stores.outside[0].on_worker(store.look) == 4  # who only reads waits for nobody
            assert len((await stores.edges.edges_of("acme", "pump"))[0]) == 4
        monkeypatch.undo()
        await stores.outside[0].on_worker(store.apply, log[4:], 8, 4)
        assert [each["target_id"] for each in (await stores.edges.edges_of("acme", "pump"))[0]] == [
            f"t{n}" for n in range(1, 9)
        ]
        assert (await stores.edges.counted(digest=False)).edges == 8
        walk = await stores.edges.expand("acme", ["pump"], [], "out", 99)
        assert len(walk.edges) == 8
