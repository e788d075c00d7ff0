"""Servers of stores that die, hang, come back and forget, under a mesh that goes on: no acknowledged write is missing
afterwards, none counts twice, and reads are answered or refused meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import redis
from backends import GPU_IS_HERE
from conftest import server_options, server_or_skip
from disk import disk, needs_root
from ledger import STRONG
from test_crash import alice_on

from bench.store_servers import MilvusServer, Neo4jServer, RedisServer, Server, running
from cli.doctor import diagnose
from cli.mesh import Mesh, MeshOptions
from memory_shards.stores.urls import StoreUrls
from mnemesh import Consistency, Memory
from mnemesh.errors import MnemeshError, NotFound, Stale, Timeout, Unavailable

LONG_MS = 60_000
GOES_WELL_MS = 1_000
AWAY: tuple[type[MnemeshError], ...] = (Unavailable, Timeout, Stale)


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that a test may kill, as long as it starts it again."""
    server = server_or_skip(lambda: RedisServer(tmp_path_factory.mktemp("own-redis")))
    with running(server):
        yield server


@pytest.fixture(scope="module")
def own_neo4j(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neo4jServer]:
    server = server_or_skip(lambda: Neo4jServer(tmp_path_factory.mktemp("own-neo4j")))
    with running(server):
        yield server


@asynccontextmanager
async def mesh_on(data: Path, urls: StoreUrls, replicas: int = 1) -> AsyncIterator[Mesh]:
    options = MeshOptions(
        server=server_options(data),
        shards=1,
        replicas=replicas,
        tenants=["acme"],
        agents=[("acme", "alice")],
        stores=urls,
    )
    async with Mesh(options) as mesh:
        yield mesh


class Load:
    """Writes one entity after another, each with an edge to the one before, for as long as it runs."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.written: list[int] = []
        self.last = 0

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            with suppress(*AWAY):
                done = await self._memory.set_context(
                    f"e{number}",
                    type="thing",
                    attributes={"n": number},
                    edges=[{"relation": "after", "target_id": f"e{number - 1}"}],
                    vectors={"v": [float(number), 1.0]},
                )
                self.written.append(number)
                self.last = done.version
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def wrote(self, more: int) -> None:
        """Wait until so many more are acknowledged."""
        wanted = len(self.written) + more
        while len(self.written) < wanted:  # noqa: ASYNC110  # another task writes
            await asyncio.sleep(0.01)


async def check_whole(memory: Memory, load: Load) -> None:
    """All that was acknowledged is there, once."""
    since = Consistency(level="session", token={"hub": load.last})
    for number in load.written:
        context = await memory.get_context(f"e{number}", consistency=since, budget_ms=LONG_MS)
        assert context.missing == []
        assert (context.attributes, context.edges) == (
            {"n": number},
            [{"relation": "after", "target_id": f"e{number - 1}"}],
        )
        events = (await memory.timeline(f"e{number}", consistency=since)).events
        assert len(events) == 1
    listed = await memory.timeline(limit=1000, consistency=since)
    listed_puts = [event.entity_id for event in listed.events if event.op == "put"]
    assert listed_puts == [f"e{number}" for number in load.written][: len(listed_puts)]
    assert len(listed.events) == min(1000, len(load.written) + len(listed.events) - len(listed_puts))


async def check_found(memory: Memory, load: Load) -> None:
    """The vectors of all that was acknowledged are found, each once."""
    written = set(load.written)
    since = Consistency(level="session", token={"hub": load.last})
    found: list[int] = []
    for low in range(0, max(written), 500):
        among = {"n": {"gt": low, "lte": low + 500}}
        asked = {"space": "v", "k": 1000, "consistency": since, "budget_ms": LONG_MS}
        hits = (await memory.search_embedding([1.0, 1.0], filter=among, **asked)).hits
        found += [int(hit.entity_id[1:]) for hit in hits]
    assert written <= set(found)
    assert len(found) == len(set(found))


def kill(server: Server) -> None:
    server.kill()


def pause(server: Server) -> None:
    server.send(signal.SIGSTOP)


def start(server: Server) -> None:
    server.start()


def resume(server: Server) -> None:
    server.send(signal.SIGCONT)


WEATHERS = pytest.mark.parametrize(
    ("away", "back"), [pytest.param(kill, start, id="killed"), pytest.param(pause, resume, id="paused")]
)


@WEATHERS
async def test_redis_goes_away_under_load(
    tmp_path: Path, own_redis: RedisServer, away: Callable[[Server], None], back: Callable[[Server], None]
) -> None:
    async with mesh_on(tmp_path, StoreUrls(attributes=own_redis.url)) as mesh, alice_on(mesh.server) as memory:
        load = Load(memory)
        async with load.running():
            await load.wrote(100)
            await memory.get_context("e1", consistency=STRONG, budget_ms=LONG_MS)
            away(own_redis)
            await load.wrote(50)  # writes are the log's: they go on
            for _ in range(2):
                with pytest.raises(AWAY):
                    await memory.get_context("e1", budget_ms=GOES_WELL_MS)
            hits = await memory.search_embedding([1.0, 1.0], space="v", k=3)
            assert len(hits.hits) == 3  # of a store that is there
            await asyncio.to_thread(back, own_redis)
            await load.wrote(50)
        await check_whole(memory, load)


@pytest.mark.weather
@WEATHERS
async def test_neo4j_goes_away_under_load(
    tmp_path: Path, own_neo4j: Neo4jServer, away: Callable[[Server], None], back: Callable[[Server], None]
) -> None:
    async with mesh_on(tmp_path, StoreUrls(edges=own_neo4j.url)) as mesh, alice_on(mesh.server) as memory:
        load = Load(memory)
        async with load.running():
            await load.wrote(100)
            whole = await memory.get_context("e2", consistency=STRONG, budget_ms=LONG_MS)
            assert (whole.missing, len(whole.edges)) == ([], 1)
            away(own_neo4j)
            await load.wrote(50)
            while not (partial := await memory.get_context("e2", budget_ms=LONG_MS)).missing:
                pass
            assert (partial.missing, partial.edges, partial.attributes) == (["edges"], [], {"n": 2})
            found = [finding.what async for finding in diagnose(mesh.options.server.data)]
            assert "the store of the edges of shard s0 does not answer" in found
            await asyncio.to_thread(back, own_neo4j)
            await load.wrote(50)
        await check_whole(memory, load)


async def test_a_redis_that_comes_back_empty_is_filled_again(tmp_path: Path, own_redis: RedisServer) -> None:
    async with mesh_on(tmp_path, StoreUrls(attributes=own_redis.url)) as mesh, alice_on(mesh.server) as memory:
        load = Load(memory)
        async with load.running():
            await load.wrote(100)
            await memory.get_context("e1", consistency=STRONG, budget_ms=LONG_MS)
            with redis.Redis(port=own_redis.port) as client:
                await asyncio.to_thread(client.flushall)
            await load.wrote(20)
        await check_whole(memory, load)


async def test_another_replica_applies_when_one_dies(
    tmp_path: Path, own_redis: RedisServer, own_neo4j: Neo4jServer
) -> None:
    urls = StoreUrls(attributes=own_redis.url, edges=own_neo4j.url)
    async with mesh_on(tmp_path, urls, replicas=2) as mesh, alice_on(mesh.server) as memory:
        load = Load(memory)
        async with load.running():
            await load.wrote(100)
            for _ in range(3):
                for replica in ("s0.0", "s0.1"):
                    mesh.children[replica].send(signal.SIGKILL)
                    await load.wrote(30)
                    written = await memory.set_context("mark", attributes={"n": load.last})
                    since = Consistency(level="session", token=written.token)
                    seen = await memory.get_context("mark", consistency=since, budget_ms=LONG_MS)
                    assert seen.version == written.version
        await memory.forget("mark")
        await check_whole(memory, load)
        with pytest.raises(NotFound):
            await memory.get_context("mark", consistency=STRONG)


@pytest.mark.weather
async def test_milvus_goes_away_under_load(tmp_path: Path) -> None:
    server = server_or_skip(lambda: MilvusServer(tmp_path / "milvus"))
    with running(server):
        async with (
            mesh_on(tmp_path / "mesh", StoreUrls(vectors=server.url), replicas=2) as mesh,
            alice_on(mesh.server) as memory,
        ):
            load = Load(memory)
            async with load.running():
                await load.wrote(100)
                await check_found(memory, load)
                for away, back in ((pause, resume), (kill, start)):
                    away(server)
                    await load.wrote(30)
                    with pytest.raises(AWAY):
                        await memory.search_embedding([1.0, 1.0], space="v", k=3, budget_ms=GOES_WELL_MS)
                    assert (await memory.get_context("e1")).attributes == {"n": 1}
                    await asyncio.to_thread(back, server)
                    await load.wrote(30)
                mesh.children["s0.0"].send(signal.SIGKILL)
                await load.wrote(30)
            await check_found(memory, load)


async def test_milvus_lite_is_killed_with_its_shard_and_loses_nothing(tmp_path: Path) -> None:
    async with mesh_on(tmp_path, StoreUrls(vectors="milvus:"), replicas=2) as mesh, alice_on(mesh.server) as memory:
        load = Load(memory)
        async with load.running():
            await load.wrote(100)
            for _ in range(2):
                for replica in ("s0.0", "s0.1"):
                    mesh.children[replica].send(signal.SIGKILL)
                    await load.wrote(50)
        for _ in range(8):  # by both replicas
            await check_found(memory, load)


@pytest.mark.skipif(GPU_IS_HERE, reason="this machine has a CUDA device")
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("cuda:", r"vectors cuda: no CUDA device for CuPy or PyTorch \(torch: .*; cupy: .*\)"),
        ("faiss:gpu", r"vectors faiss:gpu: (this is faiss-cpu; install faiss-gpu in its place|FAISS finds no GPU)"),
    ],
)
async def test_an_accelerator_that_is_not_there_is_said_at_the_start(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(Unavailable, match=says):
        async with mesh_on(tmp_path, StoreUrls(vectors=url)):
            pass


async def test_what_is_no_good_is_said_at_the_start_with_its_setting(tmp_path: Path) -> None:
    guarded = server_or_skip(lambda: RedisServer(tmp_path / "redis", "--requirepass", "right"))
    evicting = server_or_skip(
        lambda: RedisServer(tmp_path / "small", "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    )
    milvus = server_or_skip(lambda: MilvusServer(tmp_path / "milvus", guarded=True))
    with running(guarded), running(evicting), running(milvus):
        wrong = guarded.url.replace("redis://", "redis://:wrong@")
        strange = milvus.url.replace("milvus://", "milvus://root:wrong@")
        nowhere = milvus.url.replace("milvus://", "milvus://root:Milvus@") + "/nowhere"
        for number, (urls, says) in enumerate(
            [
                (StoreUrls(attributes=wrong), r"attributes redis://…@127.0.0.1:\d+/0: Redis refuses: .*password"),
                (StoreUrls(attributes=evicting.url), r"attributes redis://127.*: its maxmemory-policy is allkeys-lru"),
                (StoreUrls(vectors=strange), r"vectors milvus://…@127.0.0.1:\d+: Milvus refuses: .*password"),
                (StoreUrls(vectors=nowhere), r"vectors milvus://…@.*/nowhere: Milvus refuses: database"),
            ]
        ):
            with pytest.raises(Unavailable, match=says):
                async with mesh_on(tmp_path / str(number), urls):
                    pass


@needs_root
async def test_a_redis_whose_disk_is_full_gets_all_once_there_is_room(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", megabytes=8) as resize:
        server = server_or_skip(lambda: RedisServer(tmp_path / "disk" / "redis"))
        with running(server):
            await check_room(tmp_path / "data", server, lambda: resize(200))


async def test_a_redis_whose_memory_is_full_gets_all_once_there_is_room(tmp_path: Path) -> None:
    server = server_or_skip(lambda: RedisServer(tmp_path / "redis", "--maxmemory", "8mb"))
    with running(server), redis.Redis.from_url(server.url) as client:
        await check_room(tmp_path / "data", server, lambda: client.config_set("maxmemory", 0))


async def check_room(data: Path, server: RedisServer, make_room: Callable[[], object]) -> None:
    """While Redis takes no more writes go on, and reads of what it has; once there is room nothing is missing."""
    blob = os.urandom(10_000).hex()
    count = 300
    async with mesh_on(data, StoreUrls(attributes=server.url)) as mesh, alice_on(mesh.server) as memory:
        for n in range(count):
            written = await memory.set_context(f"e{n}", attributes={"n": n, "blob": blob})
        since = Consistency(level="session", token=written.token)
        with pytest.raises(AWAY):
            await memory.get_context(f"e{count - 1}", consistency=since, budget_ms=GOES_WELL_MS)
        for _ in range(20):
            assert (await memory.get_context("e0", budget_ms=LONG_MS)).attributes["n"] == 0
            await asyncio.sleep(0.1)
        log = mesh.children["s0.0"].log_file.read_text()
        assert re.search(r"the store of documents: (MISCONF .*No space left on device|.*'maxmemory')", log)
        make_room()
        for n in range(count):
            context = await memory.get_context(f"e{n}", consistency=since, budget_ms=LONG_MS)
            assert context.attributes["n"] == n
            assert len((await memory.timeline(f"e{n}", consistency=since)).events) == 1
