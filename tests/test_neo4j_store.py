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
from memory_shards.stores import neo4j_store
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
        return super()._apply(Paused(tx, neo4j_store._PUT_EDGES, self.stop), records, watermark, after)  # type: ignore[arg-type]


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
    backend: Backend, session: neo4j.Session
) -> None:
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
        loop = asyncio.get_running_loop()
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def pause() -> None:
            reached.set()
            await go_on.wait()

        store.stop = lambda: asyncio.run_coroutine_threadsafe(pause(), loop).result()
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(store.apply, [log[1]], 2))
            await reached.wait()
            forgetting = group.create_task(asyncio.to_thread(other.apply, [log[2]], 3, 1))
            while not (forgetting.done() or await asyncio.to_thread(is_waited_for, session)):  # noqa: ASYNC110  # the server has no event
                await asyncio.sleep(POLL_S)
            go_on.set()
        assert (await edges.edges_of("acme", mine))[0] == [edge("target")]
        assert (await edges.expand("acme", ["target"], [], "in", 9)).edges == [("target", "near", mine)]


# ── one shard, two who apply ────────────────────────────────────────────────────────────────────────────────


async def test_who_waits_too_long_for_the_lock_is_refused_and_applies_once_it_is_free(
    backend: Backend, session: neo4j.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the replica that applied hangs in the middle of a transaction."""
    monkeypatch.setattr(neo4j_store, "WRITE_S", 0.2)
    log = log_of(*(put(ms=n, edges=[edge(f"t{n}")]) for n in range(1, 9)))
    async with backend.opened() as stores:
        await apply(stores, log[:4])
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
