"""One atomic write is one transaction of a store: no reader of it ever sees half of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import neo4j
import pytest
import pytest_asyncio
from conftest import SITE, OpenAsker
from hypothesis import given
from hypothesis import strategies as st
from test_log_writer import running, write
from test_merge import put, records

import mnemesh
from bench.store_servers import Neo4jServer
from cli.server import NatsServer
from memory_shards.projection import Projection
from memory_shards.shard import Shard
from memory_shards.stores.neo4j_client import Target
from memory_shards.stores.sqlite import SqliteStore
from memory_shards.stores.urls import StoreUrls
from memory_shards.transactions import transactions
from mnemesh import Consistency, Memory, subjects
from mnemesh import follower as following
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.event import Record
from mnemesh.follower import Follower
from mnemesh.host import hosted
from mnemesh.ids import PARTITIONS
from mnemesh.jetstream import Stored, api, stream_state
from mnemesh.log_writer import LogWriter
from services.gateway import Gateway

LOG = subjects.log_stream(SITE)


# ── cutting ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=12), st.integers(1, 7))
def test_records_are_cut_in_order_and_a_write_never_in_two(writes: list[tuple[bool, int]], most: int) -> None:
    names = [str(n) if atomic else "" for n, (atomic, size) in enumerate(writes) for _ in range(size)]
    log = [
        record._replace(write=name)
        for record, name in zip(records([put(ms=n) for n in range(len(names))]), names, strict=True)
    ]
    runs = list(transactions(log, 1_000, most))
    assert [record for run, _ in runs for record in run] == log
    assert runs[-1][1] == 1_000
    for run, reached in runs[:-1]:
        assert reached == run[-1].sequence
    homes = Counter(name for run, _ in runs for name in {record.write for record in run} if name)
    assert set(homes.values()) <= {1}
    assert all(len(run) <= most or len({record.write for record in run}) == 1 for run, _ in runs)


class Noting(SqliteStore):
    """Notes how many records each of its transactions had."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sizes: list[int] = []

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        super().apply(records, watermark)
        self.sizes.append(len(records))


async def test_a_projection_commits_an_atomic_write_at_once_however_few_records_it_takes_at_a_time(
    tmp_path: Path,
) -> None:
    log = [
        Record(n, n, 0, put(ms=n, attributes={"n": n}), write="grants" if 4 <= n <= 13 else "") for n in range(1, 17)
    ]
    store = Noting(tmp_path, site="hub", partitions=frozenset({0}), incarnation="1")
    projection = Projection("documents", store, most=4)
    for some in (log[:3], log[3:13], log[13:]):
        await projection.offer(some, some[-1].sequence)
    running = asyncio.ensure_future(projection.run())
    await projection.watermark.reached(16)
    running.cancel()
    await asyncio.wait([running])
    assert store.sizes == [3, 10, 3]
    await projection.close()


# ── following ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says after 0.2 s that nothing follows, instead of 1."""
    monkeypatch.setattr(following, "HEARTBEAT_S", 0.2)


@pytest_asyncio.fixture
async def shard(own_mesh_server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("shard", own_mesh_server)


@pytest_asyncio.fixture
async def writer(own_mesh_server: NatsServer, open_asker: OpenAsker) -> AsyncIterator[LogWriter]:
    async with running(await open_asker("gateway", own_mesh_server)) as writer:
        yield writer


@contextlib.asynccontextmanager
async def followed(shard: Asker, most: int) -> AsyncIterator[AsyncIterator[list[Stored]]]:
    incarnation = (await stream_state(shard.inbox, LOG)).incarnation
    follower = Follower(shard.link, shard.inbox, LOG, incarnation=incarnation, whole=True)
    async with aclosing(follower.batches(most)) as batches:
        yield batches


async def test_a_follower_of_whole_writes_ends_no_list_within_one(shard: Asker, writer: LogWriter) -> None:
    async def append() -> None:
        for n in range(6):
            await writer.append_all([write(f"{n}-{number}") for number in range(700)])
            await writer.append_each([write(f"{n}-single-{number}") for number in range(50)])

    ends: list[int] = []
    async with followed(shard, 300) as batches, asyncio.timeout(20):
        appending = asyncio.ensure_future(append())
        while not ends or ends[-1] < 6 * 750:
            ends.append((await anext(batches))[-1].sequence)
        await appending
    assert all(end % 750 == 0 or end % 750 >= 700 for end in ends)


async def test_a_write_whose_end_was_erased_ends_with_what_is_left_of_it(
    shard: Asker, writer: LogWriter, own_mesh_server: NatsServer, open_asker: OpenAsker
) -> None:
    await writer.append_all([write(f"a{number}") for number in range(5)])
    await writer.append_all([write(f"b{number}") for number in range(5)])
    hub = await open_asker("hub", own_mesh_server)
    for sequence in (5, 10):
        subject = write(f"{'a' if sequence == 5 else 'b'}4").subject
        await api(hub.inbox, f"STREAM.PURGE.{LOG}", {"filter": subject})
    async with followed(shard, 3) as batches, asyncio.timeout(5):
        seen = [[stored.sequence for stored in await anext(batches)] for _ in range(2)]
    assert seen == [[1, 2, 3, 4], [6, 7, 8, 9]]


# ── a store that others read, too ───────────────────────────────────────────────────────────────────────────────

GRANTS = 100
WRITES = 3

_SEEN = """
MATCH (s:Shard {site: $site}) SET s.locked = true
WITH s MATCH (e:Entity {site: $site, type: 'grant'})-[:EDGE {relation: 'opens'}]->(t:Entity)
RETURN t.id AS door, count(*) AS grants
"""


@pytest_asyncio.fixture
async def alice(own_mesh_server: NatsServer, neo4j_server: Neo4jServer, tmp_path: Path) -> AsyncIterator[Memory]:
    """An agent of a mesh whose edges are in Neo4j."""

    async def link(role: str) -> Link:
        return await Link.open(own_mesh_server.credentials.load(role).link_options(role))

    shard = Shard(
        await link("shard"),
        name="s0",
        site=SITE,
        partitions=range(PARTITIONS),
        folder=tmp_path / "s0",
        stores=StoreUrls(edges=neo4j_server.url),
    )
    async with (
        hosted(Gateway(await link("gateway"), site=SITE), shard),
        mnemesh.connect(credentials=own_mesh_server.credentials.load("acme.alice").path) as memory,
    ):
        (projection,) = shard.stores.outside
        projection._most = GRANTS // 4
        yield memory


@contextlib.contextmanager
def session_of(server: Neo4jServer) -> Iterator[neo4j.Session]:
    target = Target.of(server.url)
    with neo4j.GraphDatabase.driver(target.uri, auth=target.auth) as driver, driver.session() as session:
        yield session


async def test_a_reader_of_neo4j_never_sees_half_of_an_atomic_write(alice: Memory, neo4j_server: Neo4jServer) -> None:
    done = asyncio.Event()
    seen: list[dict[str, int]] = []

    def look(session: neo4j.Session) -> dict[str, int]:
        rows = session.execute_write(lambda tx: tx.run(_SEEN, site=SITE).values())
        return dict(rows)

    async def watch() -> None:
        with session_of(neo4j_server) as session:
            while not done.is_set():
                seen.append(await asyncio.to_thread(look, session))
                await asyncio.sleep(0.02)  # it holds a lock that who applies waits for

    watching = asyncio.ensure_future(watch())
    for n in range(WRITES):
        written = await alice.ingest(
            [
                {
                    "entity_id": f"grant:{number}",
                    "type": "grant",
                    "edges": [{"relation": "opens", "target_id": f"door:{n}"}],
                    "remove_edges": [{"relation": "opens", "target_id": f"door:{n - 1}"}],
                }
                for number in range(GRANTS)
            ],
            atomic=True,
        )
    fresh = Consistency(level="session", token=written.token)
    last = [{"relation": "opens", "target_id": f"door:{WRITES - 1}"}]
    async with asyncio.timeout(60):  # a Neo4j that has just started answers slowly, and is then taken to be away
        while (await alice.get_context("grant:0", consistency=fresh, budget_ms=30_000)).edges != last:  # noqa: ASYNC110  # it polls a server
            await asyncio.sleep(0.05)
    done.set()
    await watching
    states = [state for state in seen if state]
    assert len(states) > 1
    assert all(list(state.values()) == [GRANTS] for state in states)
